"""Rows of a training run: TRL's hooks, and the checks before training starts."""

from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.dataset import prepare_dataset
from ..data.image_dataset import PEEKED_IMAGE_ROWS, peek, prepare_image_dataset
from ..data.image_rows import ImageRows
from ..data.processor import tokenizer_of
from ..data.vocabulary import check_vocabulary
from ..inspection.report import report_rows
from ..inspection.token_stats import needed
from .batch_hooks import LENGTH_STRATEGIES
from .overrides import is_overridden
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)

# If a subclass overrides one of these, rows are made one by one through them.
ROW_HOOKS = ("tokenize_row", "build_tokenized_answer")


class RowHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: how a pair becomes a row. Uses its `_rows`."""

    def build_tokenized_answer(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """Token ids of a prompt and an answer; see [`RowBuilder`]."""
        return self._rows.build_tokenized_answer(prompt, answer)

    def tokenize_row(
        self, feature: dict[str, Any], model: PreTrainedModel | nn.Module | None = None
    ) -> dict[str, list[int]]:
        """Token columns of a row of prompt, chosen and rejected text; see [`RowBuilder`]."""
        own = is_overridden(self, RowHooks, "build_tokenized_answer")
        return self._rows.tokenize_row(feature, model, self.build_tokenized_answer if own else None)

    def _prepare_rows(self, dataset: Any, name: str) -> Any:
        own = any(is_overridden(self, RowHooks, hook) for hook in ROW_HOOKS)
        if self._image_rows is not None:
            if own:
                raise ValueError(
                    f"{type(self).__name__} overrides {' or '.join(ROW_HOOKS)}, which are not "
                    "called for rows with images: the collator makes their tokens"
                )
            strategy = getattr(self.args, "train_sampling_strategy", "random")
            by_length = strategy in LENGTH_STRATEGIES
            if self.args.max_tokens_per_batch is not None or by_length:
                named = strategy if by_length else "max_tokens_per_batch"
                raise ValueError(
                    f"{named} is set and rows have images, whose lengths are not known before "
                    "the collator; remove it"
                )
            return prepare_image_dataset(
                dataset,
                self._image_rows,
                num_proc=self.args.dataset_num_proc,
                overlength=self.args.overlength,
                name=name,
            )
        return prepare_dataset(
            dataset,
            self.processing_class,
            self.tokenize_row if own else self._rows.tokenize_row,
            num_proc=self.args.dataset_num_proc,
            overlength=self.args.overlength,
            name=name,
            builder=self._rows,
        )

    def _check_rows(self, train_dataset: Any, eval_dataset: Any, vocabulary: int) -> None:
        if self._image_rows is not None:
            self._check_image_rows(train_dataset, eval_dataset, vocabulary)
            return
        check_vocabulary(train_dataset, vocabulary, name="train_dataset")
        parts = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
        for key, part in parts.items():
            if part is not None:
                name = "eval_dataset" if key is None else f"eval_dataset[{key!r}]"
                check_vocabulary(part, vocabulary, name=name)
        if PartialState().is_main_process and self.use_dpo_data_collator:
            self._report_rows(train_dataset)

    def _check_image_rows(self, train_dataset: Any, eval_dataset: Any, vocabulary: int) -> None:
        """Check the first rows of each dataset, and report those of the training data."""
        rows: ImageRows = self._image_rows
        parts = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
        for key, part in parts.items():
            if part is not None:
                name = "eval_dataset" if key is None else f"eval_dataset[{key!r}]"
                check_vocabulary(peek(part, rows, name).rows, vocabulary, name=name)
        batch = peek(train_dataset, rows, "train_dataset")
        check_vocabulary(batch.rows, vocabulary, name="train_dataset")
        if PartialState().is_main_process:
            report = report_rows(
                batch.rows,
                tokenizer_of(self.processing_class),
                max_length=self.max_length,
                sample=PEEKED_IMAGE_ROWS,
                batch_size=self.args.per_device_train_batch_size,
                overlength=self._rows.overlength_counts.get("train_dataset"),
                policy=self.args.overlength,
                images=batch.images,
            )
            logger.warning(str(report))

    def _report_rows(self, train_dataset: Any) -> None:
        columns = train_dataset.column_names
        if columns is not None and not set(needed(columns)) <= set(columns):
            return  # an overridden tokenize_row may use other names
        report = report_rows(
            train_dataset,
            tokenizer_of(self.processing_class),
            max_length=None if self.is_encoder_decoder else self.max_length,
            batch_size=self.args.per_device_train_batch_size,
            overlength=self._rows.overlength_counts.get("train_dataset"),
            policy=self.args.overlength,
        )
        logger.warning(str(report))
