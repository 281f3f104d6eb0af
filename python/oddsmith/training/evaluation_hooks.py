"""Evaluation: TRL's hooks, with metrics named after their evaluation set."""

from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.image_collator import model_inputs
from ..data.image_rows import TOKEN_TYPES
from ..data.processor import tokenizer_of
from . import completions
from .arguments import check_single
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)


class EvaluationHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: evaluation of batches and datasets."""

    # The last dataset that evaluate or predict was given, and its prepared rows.
    _last_given: tuple[Any, Any] | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """See [`~transformers.Trainer.get_eval_dataloader`]; a dataset is prepared first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._rows_of(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """See [`~transformers.Trainer.get_test_dataloader`]; the dataset is prepared first."""
        check_single(test_dataset, "test_dataset")
        return super().get_test_dataloader(cast(Any, self._rows_of(test_dataset, "test_dataset")))

    def _rows_of(self, dataset: Any, name: str) -> Any:
        """Prepared rows of a dataset that evaluate or predict was given."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset  # another class, with another collator
        if self._is_prepared(dataset):
            return dataset
        if self._last_given is None or self._last_given[0] is not dataset:
            prepared = self._prepare_rows(dataset, name)
            self._check_given(prepared, name)
            self._last_given = dataset, prepared
        if isinstance(dataset, IterableDataset) and self.accelerator.dispatch_batches is None:
            # As for the trainer's own streams: their batches cannot be sliced.
            self.accelerator.dataloader_config.dispatch_batches = False
        return self._last_given[1]

    def _is_prepared(self, dataset: Any) -> bool:
        if self._image_rows is not None:  # whose rows have no other columns then
            _, own = self._made
            parts = [*own.values()] if isinstance(own, dict) else [own]
            return any(dataset is part for part in (self.train_dataset, *parts))
        columns = dataset.column_names
        if columns is None:
            columns = next(iter(dataset), {})
        return self._token_columns <= set(columns)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of an evaluation batch, and the mean logits of both sides as predictions."""
        if not self.use_dpo_data_collator:
            logger.warning_once(
                "The evaluation step expects the batches of PreferenceCollator; with another "
                "data_collator override prediction_step if they differ."
            )
        if ignore_keys is None:
            config = getattr(model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", None)
        ignored = ignore_keys or []
        with torch.no_grad(), self._autocast():
            loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="eval")
        self._stored_metrics.watch("eval", loss, self.state.global_step)
        self.store_metrics(metrics, train_eval="eval")
        if prediction_loss_only:
            return loss.detach(), None, None
        names = [f"eval_logits/{side}" for side in ("chosen", "rejected")]
        kept = [torch.as_tensor(metrics[name]) for name in names if name not in ignored]
        logits = torch.stack(kept).to(self.accelerator.device) if kept else None
        labels = torch.zeros(len(kept), device=self.accelerator.device) if kept else None
        return loss.detach(), logits, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, with ORPO's metrics under the prefix and, if asked for, completions."""
        if self.generate_during_eval:
            self._log_completions(dataloader, metric_key_prefix)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        own = {
            f"{metric_key_prefix}_{name.removeprefix('eval_')}": value
            for name, value in self._take_metrics("eval").items()
        }
        return output._replace(metrics={**(output.metrics or {}), **own})

    def generate_from_model(self, model: nn.Module, batch: dict[str, Any]) -> list[str]:
        """Text of prompts and their sampled completions, for the prompts of a batch."""
        prompts = batch["prompt_input_ids"]
        images = model_inputs(batch)
        types = {kind: batch[name] for kind in TOKEN_TYPES if (name := f"prompt_{kind}") in batch}
        with self._autocast(), torch.no_grad():
            tokens = cast(Any, model).generate(
                input_ids=prompts,
                attention_mask=batch["prompt_attention_mask"],
                max_length=max(self.max_length, prompts.shape[1] + 1),
                do_sample=True,
                pad_token_id=tokenizer_of(self.processing_class).pad_token_id,
                **images,
                **types,
            )
        return self.processing_class.batch_decode(tokens, skip_special_tokens=True)

    def _log_completions(self, dataloader: DataLoader[Any], prefix: str) -> None:
        # All processes generate, because the model may be split; one of them writes.
        seed = self.args.seed + self.state.global_step
        rows = completions.pick_rows(dataloader.dataset, self.args.eval_batch_size, seed)
        batch: dict[str, Any] = self._prepare_inputs(self.data_collator(rows))
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with completions.untouched_randomness():
            texts = self.generate_from_model(model, batch)
        model.train(training)
        if not self.is_world_process_zero():
            return
        prompts = batch["prompt_input_ids"]
        prompts = self.processing_class.batch_decode(prompts, skip_special_tokens=True)
        pairs = zip(batch["prompt"], map(completions.completion_of, texts, prompts), strict=True)
        completions.log_completions(
            list(pairs),
            self.args.output_dir or ".",
            self.state.global_step,
            prefix,
            self.args.report_to,
        )
