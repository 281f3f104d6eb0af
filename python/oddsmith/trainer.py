"""ORPOTrainer: transformers' Trainer with the ORPO objective."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from .config import ORPOConfig
from .data.collator import PreferenceCollator
from .data.image_collator import ImageCollator
from .data.image_rows import NO_PACKING, ImageRows
from .data.pictures import has_pictures
from .data.processor import tokenizer_of
from .data.tokenizer import ensure_pad_token
from .integrations.model_path import TrainingPath, path_of
from .stage import staged_file
from .training.activation_hooks import ActivationHooks
from .training.adamw_names import ADAMW_NAMES, adamw_optimizer
from .training.arguments import check_arguments, own_config
from .training.batch_hooks import BatchHooks
from .training.checkpoint_hooks import CheckpointHooks
from .training.current_args import CurrentArgs
from .training.engine import splits_batches
from .training.engine_hooks import EngineHooks
from .training.evaluation_hooks import EvaluationHooks
from .training.gradient_hooks import GradientHooks
from .training.image_models import allow_unused_parameters, check_image_model
from .training.loss_hooks import LossHooks
from .training.low_rank_names import LOW_RANK_NAMES, low_rank_optimizer
from .training.metrics import EMPTY_COMPLETIONS, FIRST_NON_FINITE, NON_FINITE, MetricStore, Split
from .training.model_card import CITATION, model_card
from .training.model_loan import ModelLoan
from .training.models import (
    check_adapter,
    check_model,
    load_model,
    load_processing_class,
    prepare_model,
    vocabulary_size,
)
from .training.row_hooks import RowHooks
from .training.save_hooks import SaveHooks
from .training.stop_hooks import StopHooks

logger = logging.get_logger(__name__)


class ORPOTrainer(
    CurrentArgs,
    ModelLoan,
    StopHooks,
    RowHooks,
    BatchHooks,
    LossHooks,
    ActivationHooks,
    GradientHooks,
    EvaluationHooks,
    SaveHooks,
    CheckpointHooks,
    EngineHooks,
    Trainer,
):
    r"""
    Trains a model on preference pairs with ORPO (Hong et al. 2024, arXiv 2403.07691).

    A drop-in replacement of TRL's trainer of this name, with its arguments, hooks, rows, loss and
    metrics. The loss is computed in the model's output head, without the logits of the batch,
    unless the model's head or an overridden hook needs them.

    Args:
        model (`PreTrainedModel`, `PeftModel` or `str`, *optional*):
            The model, or the hub id or folder to load it from.
        args ([`ORPOConfig`], *optional*):
            Arguments of the run. TRL's `ORPOConfig` is converted.
        data_collator (`Callable`, *optional*):
            Makes batches from rows; [`~oddsmith.data.collator.PreferenceCollator`] if not given.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with `chosen`, `rejected` and, unless it is implicit, `prompt`; for image-text
            models also with `images` or `image`.
        eval_dataset (`Dataset`, `IterableDataset` or `dict` of them, *optional*):
            Rows for evaluation; metrics of a dict are `eval_{key}_...`.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The tokenizer, or the processor of an image-text model; that of the model if not given.
        model_init (`Callable`, *optional*):
            Makes the model, instead of `model`.
        callbacks (`list[TrainerCallback]`, *optional*):
            See [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*): See [`~transformers.Trainer`].
        preprocess_logits_for_metrics (`Callable`, *optional*): See [`~transformers.Trainer`].
        peft_config (`PeftConfig`, *optional*):
            Adapter to add to the model.
        compute_metrics (`Callable`, *optional*):
            See [`~transformers.Trainer`]. Its predictions are the mean logits of both sides.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Older name of `processing_class`.

    Raises:
        ValueError: For arguments that contradict each other, or rows that cannot be used.
        TypeError: For an argument of the wrong type.
    """

    # The loss of a micro-batch is its mean: Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga: bool | None = False

    _tag_names = ["oddsmith", "orpo"]
    _name = "ORPO"
    _paper = {
        "title": "ORPO: Monolithic Preference Optimization without Reference Model",
        "id": "2403.07691",
        "citation": CITATION,
    }

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Any] | None = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[Any], dict[str, Any]] | None = None,
        tokenizer: Any = None,
    ):
        if args is None:
            args = ORPOConfig(output_dir="tmp_trainer")
        args = own_config(args)
        check_arguments(model, args, train_dataset, model_init, processing_class, tokenizer)
        processing_class = tokenizer if processing_class is None else processing_class

        self.args = args
        self.model_init = model_init
        self._peft_config = peft_config
        self._peft_has_been_casted_to_bf16 = False
        # The adapter's weights are random, so the seed must be set before.
        set_seed(args.seed)
        revision = args.model_kwargs().get("revision")
        # With a collator of the user's, images are his.
        self._has_images = data_collator is None and any(
            map(has_pictures, (train_dataset, eval_dataset))
        )
        if isinstance(model, str):
            model = load_model(model, args, self._has_images)
        if model_init is None:
            model = self._take_model(model)
        else:
            model = self.call_model_init()

        accelerator_config = cast(Any, args.accelerator_config)
        if accelerator_config.dispatch_batches is None:
            # By default one process collates a stream's batches for all, but accelerate cannot
            # slice their strings or join batches of different lengths.
            parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            if any(isinstance(part, IterableDataset) for part in (train_dataset, *parts)):
                accelerator_config.dispatch_batches = False

        self._read_config(model.config)
        # Before the rows, which may take hours.
        self._start_engine(model, own_optimizer=optimizers[0] is None)

        if processing_class is None:
            processing_class = load_processing_class(model, revision, args)
        tokenizer = tokenizer_of(processing_class)
        pad_token_id = ensure_pad_token(tokenizer)
        self.processing_class = processing_class
        self.use_dpo_data_collator: bool = data_collator is None
        if data_collator is None:
            data_collator = self._own_collator = PreferenceCollator(
                pad_token_id,
                args.label_pad_token_id,
                self.is_encoder_decoder,
                packing=self._packs(),
                share_prompt=args.share_prompt,
            )
            args.remove_unused_columns = False  # the model's forward has none of the columns

        self._rows = self._row_builder()
        if self._has_images:
            self._image_rows = ImageRows(processing_class, self._rows)
            data_collator = ImageCollator(self._image_rows, cast(PreferenceCollator, data_collator))
        train_dataset, eval_dataset = self._prepare_given(train_dataset, eval_dataset)
        self._check_rows(train_dataset, eval_dataset, vocabulary_size(model))

        self._stored_metrics = MetricStore()
        self._warned_of_non_finite: set[str] = set()
        # Trainer calls model_init itself; give it the model from above.
        self._first_model = model if model_init is not None else None
        # transformers' callback for it is replaced by ours.
        stops, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(
            model=model if model_init is None else None,
            args=args,
            data_collator=data_collator,
            train_dataset=cast(Any, train_dataset),
            eval_dataset=cast(Any, eval_dataset),
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # The form of loss_is_scaled_for_ga before transformers 5.19.
        self.model_accepts_loss_kwargs = False
        args.enable_jit_checkpoint = stops
        if stops:
            self._stop_on_signal()
        if callable(add_tags := getattr(self.model, "add_model_tags", None)):
            add_tags(self._tag_names)
        self._announce_path()
        self._start_following()

    # ---- Start ----

    @property
    def tokenizer(self) -> Any:
        """Older name of `processing_class`; the tokenizer of a processor."""
        return tokenizer_of(self.processing_class)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model from `model_init`, with its adapter."""
        first, self._first_model = getattr(self, "_first_model", None), None
        if first is not None:
            return first
        before = self.path
        model = self._take_model(super().call_model_init(trial))
        if self._run_with and self.path != before:  # not within __init__
            self._announce_path()
        return model

    def _take_model(self, model: Any) -> nn.Module:
        check_model(model)
        model, casted = prepare_model(model, self.args, self._peft_config)
        self._peft_has_been_casted_to_bf16 = casted
        check_adapter(model)
        self._lend(model)
        if self._has_images:
            check_image_model(model, self.args)
        allow_unused_parameters(model, self.args)
        self._choose_path(model)
        return model

    def _choose_path(self, model: nn.Module) -> None:
        path = path_of(model, self.args, NO_PACKING if self._has_images else None)
        self._plain_because, self._padded_because = path.plain_because, path.padded_because
        self._row_limits = path.limits
        if self._own_collator is not None:
            self._own_collator.packing = self._packs()

    def _packs(self) -> bool:
        """Whether batches are run as packed rows."""
        from_logits = self._plain_because is not None or bool(self._own_loss_hooks())
        return self._padded_because is None and not from_logits

    @property
    def path(self) -> TrainingPath:
        """How batches go through the model, and why it is not a faster way."""
        overridden = self._own_loss_hooks()
        plain = self._plain_because
        if overridden:
            plain = f"{type(self).__name__} overrides {', '.join(overridden)}"
        return TrainingPath(self._padded_because, plain, self._row_limits)

    def _announce_path(self) -> None:
        if splits_batches(self.args, self.model) and self._plain_because is None:
            self._plain_because = "DataParallel splits batches; start one process per GPU instead"
            if self._own_collator is not None:
                self._own_collator.packing = self._packs()
        path = self.path
        asked = self.args.use_fused_head and (self.args.padding_free or path.plain_because)
        # What the user has asked for, or gets by default, is no warning.
        (logger.warning if path.reasons and asked else logger.info)(str(path))

    def _read_config(self, config: Any) -> None:
        self.is_encoder_decoder: bool = config.is_encoder_decoder
        if self.is_encoder_decoder:
            self.decoder_start_token_id: int | None = config.decoder_start_token_id
            self.pad_token_id: int | None = config.pad_token_id
        self.aux_loss_enabled: bool = getattr(config, "output_router_logits", False)
        self.aux_loss_coef: float = getattr(config, "router_aux_loss_coef", 0.0)
        if self.aux_loss_enabled and self.aux_loss_coef == 0.0:
            logger.warning(
                "config.output_router_logits is True but config.router_aux_loss_coef is 0.0: the "
                "auxiliary loss has no effect; set the coefficient."
            )

    # ---- Optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See [`~transformers.Trainer.get_optimizer_cls_and_kwargs`]; 8-bit and paged AdamW, GaLore
        and APOLLO are from oddsmith.
        """
        if args.optim in LOW_RANK_NAMES:
            return low_rank_optimizer(args, model)
        if args.optim in ADAMW_NAMES:
            return adamw_optimizer(args, model)
        return Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))

    # ---- Loss and metrics ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """
        Mean loss of a micro-batch; its metrics are kept for the next log.

        `num_items_in_batch` is not used: the terms are means over tokens and over pairs.
        """
        with self._autocast():
            loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="train")
        loss = loss.to(self.args.device)
        self._last_loss = loss.detach()
        self._stored_metrics.watch("train", loss, self.state.global_step + 1)
        self.store_metrics(metrics, train_eval="train")
        return (loss, metrics) if return_outputs else loss

    def store_metrics(self, metrics: dict[str, Any], train_eval: Split = "train") -> None:
        """Keep metrics for the next log; tensors stay on the device until then."""
        weights = self._batch_weights
        self._stored_metrics.add(train_eval, metrics, weights.pairs, weights.others)

    def _take_metrics(self, split: Split) -> dict[str, float]:
        """Averages since the last call; warns if a loss was not finite."""
        metrics = self._stored_metrics.pop(split, self.accelerator)
        count, first = (metrics.pop(name, 0) for name in (NON_FINITE, FIRST_NON_FINITE))
        if count and split not in self._warned_of_non_finite:
            self._warned_of_non_finite.add(split)
            kind = "training" if split == "train" else "evaluation"
            logger.warning(
                f"The {kind} loss was NaN or infinite, first at step {int(first)}. The logged loss "
                + ("excludes such batches" if self.args.logging_nan_inf_filter else "includes them")
                + " (logging_nan_inf_filter). This is logged once."
            )
        prefix = "eval_" if split == "eval" else ""
        if not metrics.get(f"{prefix}{EMPTY_COMPLETIONS}", 1):
            del metrics[f"{prefix}{EMPTY_COMPLETIONS}"]
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` and the metrics since the last log."""
        if "loss" in logs:
            logs.update(self._take_metrics("train"))
            if self.args.beta_schedule != "constant":
                logs["beta"] = self.beta
        elif "train_runtime" in logs:
            self._take_metrics("train")  # of steps after the last log
        elif any(key.startswith("eval_") for key in logs):
            # Of an overridden evaluation_loop; parts of the loss are used by ours only.
            metrics = self._take_metrics("eval")
            logs.update((name, metrics[name]) for name in metrics if not name.startswith("_"))
        if hasattr(optimizer := self._own_optimizer(), "report"):
            optimizer.report()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Tokens of both sides of a batch; Trainer would use `input_ids`."""
        sides = [inputs.get(f"{side}_input_ids") for side in ("chosen", "rejected")]
        ids = [side for side in sides if isinstance(side, Tensor)]
        if len(ids) < 2:
            return 0
        name = getattr(self.model, "main_input_name", "input_ids")
        tokens = torch.empty(sum(side.numel() for side in ids), device="meta")
        return super().floating_point_ops({name: tokens})

    def _autocast(self) -> AbstractContextManager:
        if self._peft_has_been_casted_to_bf16:
            return torch.autocast(self.accelerator.device.type)
        return nullcontext()

    # ---- Saving ----

    # The arguments are those of TRL.
    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write a model card to `output_dir/README.md`.

        Args:
            model_name (`str`, *optional*): Name of the trained model.
            dataset_name (`str`, *optional*): Id of the dataset.
            tags (`str` or `list[str]`, *optional*): Tags to add to those of the trainer.
        """
        if not self.is_world_process_zero():
            return
        base = getattr(self.model.config, "_name_or_path", "")
        base = base if base and not Path(base).is_dir() else None
        tags = [tags] if isinstance(tags, str) else tags or []
        text = model_card(self.args, model_name, base, dataset_name, {*tags, *self._tag_names})
        path = Path(self.args.output_dir or ".") / "README.md"
        with staged_file(path) as file:
            file.write(text.encode())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        hub = self.args.hub_model_id
        self.create_model_card(
            hub.split("/")[-1] if hub else Path(self.args.output_dir or ".").name
        )
        with self._resumable():
            super()._save_checkpoint(model, trial)
        self._end_if_stopped(trial)
