"""Rows of a training run: TRL's hooks, and the checks before training starts."""

from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.dataset import prepare_dataset
from ..data.layouts import parse_column_mapping
from ..data.rows import TOKEN_COLUMNS
from ..data.vocabulary import check_vocabulary
from ..inspection.report import log_report, report_rows
from ..inspection.token_stats import needed
from .models import vocabulary_size
from .overrides import is_overridden
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
        own = any(is_overridden(self, RowHooks, hook) for hook in ROW_HOOKS)
        return prepare_dataset(
            dataset,
            self.processing_class,
            self.tokenize_row if own else self._rows.tokenize_row,
            num_proc=self.args.dataset_num_proc,
            overlength=self.args.overlength,
            name=name,
            builder=self._rows,
            column_mapping=parse_column_mapping(self.args.column_mapping, self.args.prompt_column),
        )

    def _check_given(self, rows: Any, name: str) -> None:
        """The checks of a dataset that comes after the start."""
        check_vocabulary(rows, vocabulary_size(self.model), name=name)
        if PartialState().is_main_process and self.use_dpo_data_collator:
            self._report_rows({name: rows})

    def _check_rows(self, train_dataset: Any, eval_dataset: Any, vocabulary: int) -> None:
        # What tells prepared rows from others.
        made = train_dataset.column_names or next(iter(train_dataset), {})
        own = set(TOKEN_COLUMNS) & set(made)
        self._token_columns = own or set(made) - {"prompt", "chosen", "rejected"}
        check_vocabulary(train_dataset, vocabulary, name="train_dataset")
        for name, part in _named(eval_dataset).items():
            if part is not None:
                check_vocabulary(part, vocabulary, name=name)
        if PartialState().is_main_process and self.use_dpo_data_collator:
            sets = {"train_dataset": train_dataset, **_named(eval_dataset)}
            self._report_rows({name: part for name, part in sets.items() if part is not None})

    def _report_rows(self, sets: dict[str, Any]) -> None:
        """One report at INFO; a warning for each likely mistake."""
        reports = []
        for name, rows in sets.items():
            columns = rows.column_names
            if columns is not None and not set(needed(columns)) <= set(columns):
                continue  # an overridden tokenize_row may use other names
            training = name == "train_dataset"
            args = self.args
            report = report_rows(
                rows,
                self.processing_class,
                max_length=None if self.is_encoder_decoder else self.max_length,
                max_prompt_length=self.max_prompt_length,
                name=name,
                batch_size=args.train_batch_size if training else args.eval_batch_size,
                notes=self._rows.notes.get(name),
                policy=args.overlength,
            )
            reports.append(report)
        passive = self.args.log_level == "passive"
        log_report(logger, reports, None if passive else self.args.get_process_log_level())


def _named(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation sets by their names in the log."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{key!r}]": part for key, part in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}
