"""Rows of a training run: TRL's hooks, and the checks before training starts."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.dataset import prepare_dataset
from ..data.image_dataset import PEEKED_IMAGE_ROWS, peek, prepare_image_dataset
from ..data.layouts import parse_column_mapping
from ..data.pictures import has_pictures
from ..data.processor import tokenizer_of
from ..data.rows import TOKEN_COLUMNS
from ..data.standard_rows import has_transform
from ..data.vocabulary import check_vocabulary
from ..inspection.report import SAMPLE, DataReport, log_report, report_rows
from ..inspection.token_stats import needed
from .batch_hooks import LENGTH_STRATEGIES
from .image_filler import SEARCHED_ROWS, ImageFiller, row_with_image
from .models import vocabulary_size
from .overrides import is_overridden
from .shared_rows import once_per_node
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)

# If a subclass overrides one of these, rows are made one by one through them.
ROW_HOOKS = ("tokenize_row", "build_tokenized_answer")


class RowHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: how a pair becomes a row. Uses its `_rows`."""

    # The columns that rows get from the tokenizer.
    _token_columns: set[str] = set()

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
        if isinstance(dataset, dict):
            parts = ((key, part, f"{name}[{key!r}]") for key, part in dataset.items())
            made = {key: self._prepare_rows(part, within) for key, part, within in parts}
            return type(dataset)(made)
        prepare = partial(self._prepare_own_rows, dataset, name)
        images = self._image_rows is not None
        # Rows with images are made in the collator, unless the long ones are looked for.
        lasts = not images or (self.args.overlength == "drop" and not has_transform(dataset))
        return once_per_node(prepare) if lasts and isinstance(dataset, Dataset) else prepare()

    def _prepare_own_rows(self, dataset: Any, name: str) -> Any:
        own = any(is_overridden(self, RowHooks, hook) for hook in ROW_HOOKS)
        mapping = parse_column_mapping(self.args.column_mapping, self.args.prompt_column)
        if self._image_rows is not None:
            self._check_for_images(own)
            return prepare_image_dataset(
                dataset,
                self._image_rows,
                num_proc=self.args.dataset_num_proc,
                overlength=self.args.overlength,
                name=name,
                column_mapping=mapping,
            )
        if self.use_dpo_data_collator and has_pictures(dataset):  # one that comes later
            raise ValueError(
                f"{name} has images and the data that the trainer was created with has none; remove "
                "the column, or create another trainer"
            )
        return prepare_dataset(
            dataset,
            self.processing_class,
            self.tokenize_row if own else self._rows.tokenize_row,
            num_proc=self.args.dataset_num_proc,
            overlength=self.args.overlength,
            name=name,
            builder=self._rows,
            column_mapping=mapping,
        )

    def _check_for_images(self, own_rows: bool) -> None:
        """What cannot be done with rows with images."""
        if own_rows:
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

    def _check_given(self, rows: Any, name: str) -> None:
        """The checks of a dataset that comes after the start."""
        self._check_sets({name: rows}, vocabulary_size(self.model))

    def _check_rows(self, train_dataset: Any, eval_dataset: Any, vocabulary: int) -> None:
        # What tells prepared rows from others.
        made = train_dataset.column_names or next(iter(train_dataset), {})
        own = set(TOKEN_COLUMNS) & set(made)
        self._token_columns = own or set(made) - {"prompt", "chosen", "rejected"}
        sets = {"train_dataset": train_dataset, **_named(eval_dataset)}
        sets = {name: part for name, part in sets.items() if part is not None}
        self._check_sets(sets, vocabulary)
        if self._image_rows is not None and self._gathers:
            self._filler = self._image_filler(sets.values())

    def _image_filler(self, sets: Iterable[Any]) -> ImageFiller:
        """From a row with images, the same on all processes."""
        for part in sets:
            shown = part if has_transform(part) else part.with_format(None)
            row = row_with_image(shown)
            if row is not None:
                batch = self._image_rows.build([row], ["the first row with images"])
                return ImageFiller(batch, counted=self.aux_loss_enabled)
        raise ValueError(
            f"rows have a column of images, but none of the first {SEARCHED_ROWS} has one, and processes "
            "that share the model's vision part need one: shuffle the rows, or train on the text "
            "alone with dataset.remove_columns(...)"
        )

    def _check_sets(self, sets: dict[str, Any], vocabulary: int) -> None:
        """Check the ids of datasets, and report them: rows with images by the first ones."""
        reports = []
        for name, part in sets.items():
            images = None
            if self._image_rows is not None:
                batch = peek(part, self._image_rows, name)
                part, images = batch.rows, batch.images
            check_vocabulary(part, vocabulary, name=name)
            if PartialState().is_main_process and self.use_dpo_data_collator:
                reports.append(self._report(part, name, images))
        passive = self.args.log_level == "passive"
        log_report(
            logger,
            [report for report in reports if report is not None],
            None if passive else self.args.get_process_log_level(),
        )

    def _report(self, rows: Any, name: str, images: list[int] | None) -> DataReport | None:
        columns = getattr(rows, "column_names", None)
        if columns is not None and not set(needed(columns)) <= set(columns):
            return None  # an overridden tokenize_row may use other names
        args = self.args
        training = name == "train_dataset"
        return report_rows(
            rows,
            tokenizer_of(self.processing_class),
            max_length=None if self.is_encoder_decoder else self.max_length,
            max_prompt_length=self.max_prompt_length,
            name=name,
            sample=SAMPLE if images is None else PEEKED_IMAGE_ROWS,
            batch_size=args.train_batch_size if training else args.eval_batch_size,
            notes=self._rows.notes.get(name),
            policy=args.overlength,
            images=images,
        )


def _named(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation sets by their names in the log."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{key!r}]": part for key, part in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}
