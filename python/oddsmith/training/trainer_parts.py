"""The attributes that the parts of the trainer share, for the type checker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import Trainer

    from ..config import ORPOConfig
    from ..data.rows import RowBuilder
    from .image_filler import ImageFiller
    from .metrics import BatchWeights, MetricStore, Split

    class TrainerParts(Trainer):
        """
        Base of [`ModelLoan`], [`RowHooks`], [`BatchHooks`], [`LossHooks`] and [`EvaluationHooks`].

        Each is a part of [`~oddsmith.ORPOTrainer`] and comes before `Trainer` there: it can use the
        attributes below and call `super()`. Not a protocol, because `super()` needs a base class.
        """

        args: ORPOConfig
        accelerator: Accelerator
        model: nn.Module
        processing_class: Any
        data_collator: Callable[..., Any]

        # ---- Set by the trainer ----

        @property
        def beta(self) -> float: ...

        @property
        def padding_value(self) -> int: ...

        @property
        def tokenizer(self) -> Any: ...

        is_encoder_decoder: bool
        decoder_start_token_id: int | None
        pad_token_id: int | None
        aux_loss_enabled: bool
        aux_loss_coef: float
        max_length: int
        max_prompt_length: int | None
        generate_during_eval: bool
        use_dpo_data_collator: bool
        _rows: RowBuilder
        _token_columns: set[str]
        _image_rows: Any
        _filler: ImageFiller | None
        _gathers: bool
        _made: tuple[Any, Any]
        _last_given: tuple[Any, Any] | None
        _stored_metrics: MetricStore
        _batch_weights: BatchWeights
        _own_loss: tuple[Tensor, Tensor] | None
        _fills_up: bool
        _scheduled_beta: float | None
        _last_loss: Any
        _run_with: dict[str, Any]
        how_to_go_on: str
        _staging: bool
        # Of transformers.Trainer.
        _trial: Any

        # ---- Used by other parts ----

        def get_batch_loss_metrics(
            self, model: nn.Module, batch: dict[str, Any], train_eval: Split = "train"
        ) -> tuple[Tensor, dict[str, Tensor]]: ...

        def store_metrics(self, metrics: dict[str, Any], train_eval: Split = "train") -> None: ...

        def _take_metrics(self, split: Split) -> dict[str, float]: ...

        def _prepare_rows(self, dataset: Any, name: str) -> Any: ...

        def _check_given(self, rows: Any, name: str) -> None: ...

        def _borrow(self) -> None: ...

        def _lend(self, model: nn.Module) -> None: ...

        def _get_output_dir(self, trial: Any) -> str: ...

        def _packs(self) -> bool: ...

        def _choose_path(self, model: nn.Module) -> None: ...

        def _announce_path(self) -> None: ...

        def _check_rows(self, train_dataset: Any, eval_dataset: Any, vocabulary: int) -> None: ...

        def _own_optimizer(self) -> Any: ...

        def _autocast(self) -> AbstractContextManager[Any]: ...

else:
    # Nothing at run time: the order of the trainer's bases gives each part the others and `Trainer`.
    TrainerParts = object
