"""Evaluation: TRL's hooks, with metrics named after their evaluation set."""

from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from ..data.image_collator import model_inputs
from ..data.image_rows import TOKEN_TYPES
from ..data.processor import tokenizer_of
from . import completions
from .arguments import check_single
from .engine import data_parallel
from .evaluation_batches import FILLS_UP, evaluation_loader
from .metrics import PAIR_LOSS, PAIRS, TOKEN_LOSS
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)


class EvaluationHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: evaluation of batches and datasets."""

    # The last dataset that evaluate or predict was given, and its prepared rows.
    _last_given: tuple[Any, Any] | None = None

    @cached_property
    def _shared_loaders(self) -> WeakKeyDictionary[Any, DataLoader[Any]]:
        """Loaders of one of several processes whose workers stay, by their rows."""
        return WeakKeyDictionary()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """See [`~transformers.Trainer.get_eval_dataloader`]; a dataset is prepared first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._rows_of(eval_dataset, "eval_dataset")
        if (size := data_parallel(self.accelerator)[0]) == 1:
            return super().get_eval_dataloader(eval_dataset)
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            given = cast(Any, self.eval_dataset)[eval_dataset]
        if given is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self._shared_loader(given, size)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """See [`~transformers.Trainer.get_test_dataloader`]; the dataset is prepared first."""
        check_single(test_dataset, "test_dataset")
        rows = self._rows_of(test_dataset, "test_dataset")
        if (size := data_parallel(self.accelerator)[0]) == 1:
            return super().get_test_dataloader(cast(Any, rows))
        return self._shared_loader(rows, size)

    def _shared_loader(self, rows: Any, size: int) -> DataLoader[Any]:
        """Batches of this process, of `size` that share the rows; no row is in two of them."""
        args, batch_size, collate = self.args, self.args.eval_batch_size, self.data_collator
        keeps = args.dataloader_persistent_workers and isinstance(rows, (Dataset, IterableDataset))
        if keeps and rows in self._shared_loaders:
            return self._shared_loaders[rows]
        if self.accelerator.dataloader_config.split_batches:
            batch_size = max(1, batch_size // size)
        shown: Any = rows
        if isinstance(rows, Dataset):
            shown = self._remove_unused_columns(cast(Any, rows), description="Evaluation")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="Evaluation")
        order = None
        if has_length(shown):
            # The same order on all processes, whatever their random states are.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed)
                sampler = self._get_eval_sampler(cast(Any, shown))
                order = list(range(len(shown)) if sampler is None else sampler)
        workers: dict[str, Any] = {}
        if args.dataloader_num_workers:
            workers["persistent_workers"] = args.dataloader_persistent_workers
            workers["prefetch_factor"] = args.dataloader_prefetch_factor
        loader = evaluation_loader(
            shown,
            order,
            batch_size,
            self.accelerator,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            **workers,
        )
        if keeps:
            self._shared_loaders[rows] = loader
        return loader

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
        self._fills_up, self._own_loss = bool(inputs.pop(FILLS_UP, False)), None
        with torch.no_grad(), self._autocast():
            loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="eval")
        self._stored_metrics.watch("eval", loss, self.state.global_step)
        self.store_metrics(metrics, train_eval="eval")
        self._store_loss(loss)
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
        metrics = self._take_metrics("eval")
        parts = [metrics.pop(name) for name in (TOKEN_LOSS, PAIR_LOSS) if name in metrics]
        if parts:  # else an overridden prediction_step
            metrics["loss"] = sum(parts)
        pairs = int(metrics.pop(PAIRS, 0))
        if pairs and not has_length(dataloader.dataset):
            size, _ = data_parallel(self.accelerator)
            pairs = pairs * size // self.accelerator.num_processes
            output = output._replace(num_samples=pairs)
        own = {
            f"{metric_key_prefix}_{name.removeprefix('eval_')}": value
            for name, value in metrics.items()
        }
        return output._replace(metrics={**(output.metrics or {}), **own})

    def _store_loss(self, loss: Tensor) -> None:
        """Keeps an evaluation batch's loss in the parts that are means over tokens and over pairs."""
        weights, own = self._batch_weights, self._own_loss
        # With the filter, as Trainer does it, batches without a finite loss do not count.
        filters = self.args.logging_nan_inf_filter
        kept = (torch.isfinite(loss) if filters else torch.ones_like(loss)).double()
        parts = {PAIR_LOSS: loss}
        counts = {PAIR_LOSS: kept * weights.pairs}
        if own is not None and own[0] is loss:  # else a hook has changed it
            parts = {TOKEN_LOSS: own[1], PAIR_LOSS: loss - own[1]}
            counts[TOKEN_LOSS] = kept * weights.others["eval_nll_loss"]
        self._stored_metrics.add("eval", parts, weights=counts)
        self._stored_metrics.add("eval", {PAIRS: torch.tensor(weights.pairs)})

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
        # With DeepSpeed installed the type checker takes it for a tensor.
        model: Any = self.accelerator.unwrap_model(self.model)
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
