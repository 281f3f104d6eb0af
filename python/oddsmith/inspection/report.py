"""DataReport: figures of a preference dataset in tokens, and likely mistakes."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np
from datasets import Dataset

from ..data.arrow_rows import arrow_batches
from ..data.chat import TEXT_FIELDS, common_prefix_length
from ..data.layouts import CONVERSATIONS, QUESTIONS, SYSTEMS
from ..data.notes import RowNotes
from .token_stats import Finding, Ragged, TokenRows, TokenStats, needed, padded_tokens, quantiles

# Below transformers' logger, so that its verbosity shows and silences the figures.
FIGURES = logging.getLogger("transformers.oddsmith")

Row = Mapping[str, Any]

# Rows of a chunk: its columns are a few MB.
CHUNK = 1000
# Rows whose text is checked. Everything else is counted over all rows.
SAMPLE = 2000
# Shorter prompts occur in many answers by chance.
_SHORTEST_PROMPT = 8

# The text of a finding and what to do about it; `{}` is replaced by max_length.
FINDINGS = {
    "prompt_twice": (
        "have the prompt twice, once in `prompt` and once inside chosen and rejected",
        "remove the `prompt` column, or keep only the answers in chosen and rejected",
    ),
    "double_bos": (
        "have more than one BOS token",
        "the text or the chat template adds it too: remove it there",
    ),
    "missing_eos": (
        "do not end in EOS",
        "end both answers with the tokenizer's EOS token, or the model never learns to stop",
    ),
    "identical": (
        "have the same chosen and rejected completion",
        "they teach no preference: drop them",
    ),
    "empty": (
        "have an empty completion",
        "drop them, or raise max_length to leave room for the answers",
    ),
    "too_long": (
        "have a prompt longer than max_length {}, which TRL's rule does not cut",
        "set max_prompt_length or overlength='drop'",
    ),
    "no_context": (
        "have an empty prompt and no BOS token, so the first token of their answers is not trained on",
        "give them a prompt, or set tokenizer.bos_token",
    ),
    "no_eos_token": ("", "the tokenizer has no EOS token; set tokenizer.eos_token"),
}


@dataclass
class DataReport:
    """
    The report of [`report_rows`] and `oddsmith inspect`.

    Args:
        name (`str`): Name of the dataset.
        stats ([`TokenStats`]): Figures of the rows.
        batch_size (`int`): Pairs per batch.
        text (`dict[str, Finding]`, *optional*): Faults found in texts.
        texts (`int`, *optional*): Rows whose text was checked.
        overlength (`int`, *optional*): Rows that were too long; None if not counted.
        policy (`str`, *optional*): What happened to them: `"truncate"` or `"drop"`.
        partial (`bool`, *optional*): Whether these are only the first rows of a stream.
        unused (`tuple[str, ...]`, *optional*): Columns with text that is not trained on.
        images (`Sequence[int]`, *optional*): Images of each row; None for rows of text.
    """

    name: str
    stats: TokenStats
    batch_size: int = 1
    text: dict[str, Finding] = field(default_factory=dict)
    texts: int = 0
    overlength: int | None = None
    policy: str = "truncate"
    partial: bool = False
    unused: tuple[str, ...] = ()
    images: Sequence[int] | None = None

    @property
    def findings(self) -> list[str]:
        """One line per fault: number of rows, first row, and what to do."""
        stats, lines = self.stats, []
        if stats.eos is None:
            lines.append(f"{self.name}: {FINDINGS['no_eos_token'][1]}.")
        asked = [name for name in self.unused if name in (*QUESTIONS, *CONVERSATIONS, *SYSTEMS)]
        if asked:
            lines.append(
                f"{self.name}: {_columns(asked)} text that is not trained on; column_mapping "
                "makes it the prompt or the system message."
            )
        for key, (what, fix) in FINDINGS.items():
            finding = self.text.get(key) or getattr(stats, key, None)
            if finding is None or not finding.count:
                continue
            of = self.texts if key in self.text else stats.rows
            lines.append(
                f"{self.name}: {finding.count} of {of} rows {what.format(stats.max_length)} "
                f"(first: row {finding.first}); {fix}."
            )
        return lines

    def figures(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        stats = self.stats
        shared, chosen, rejected = (part.astype(np.int64) for part in stats.lengths())
        apart = int((chosen + rejected).sum())
        once = int((chosen + rejected - shared).sum())
        padded = padded_tokens(chosen, rejected, self.batch_size)
        counted = {
            key: {"rows": finding.count, "first": finding.first}
            for key in FINDINGS
            if (finding := self.text.get(key) or getattr(stats, key, None)) is not None
        }
        return {
            "name": self.name,
            "rows": stats.rows,
            "partial": self.partial,
            "tokens": {
                "prompt": quantiles(shared),
                "chosen": quantiles(chosen - shared),
                "rejected": quantiles(rejected - shared),
            },
            "overlength": {"rows": self.overlength, "policy": self.policy},
            "max_length": stats.max_length,
            "repeated_prompts": stats.repeated.count,
            "near_duplicate_prompts": stats.similar.count,
            "batch_size": self.batch_size,
            "positions": {
                "padded": padded,
                "packed": apart,
                "shared_prompts": once,
                "pad_share": round(1 - apart / padded, 4) if padded else 0.0,
                "sharing_factor": round(apart / once, 4) if once else 1.0,
            },
            "images": None
            if self.images is None
            else {"rows": sum(count > 0 for count in self.images), "images": sum(self.images)},
            "sampled_texts": self.texts,
            "unused_columns": list(self.unused),
            "findings": counted,
        }

    def lines(self) -> list[str]:
        """The report as text."""
        figures = self.figures()
        rows, positions = figures["rows"], figures["positions"]
        head = f"{self.name}: {'first ' if self.partial else ''}{rows:,} rows"
        head += f", {positions['packed']:,} tokens"
        if self.overlength is not None:
            done = "dropped" if self.policy == "drop" else "truncated"
            limit = f" (max_length {self.stats.max_length})" if self.stats.max_length else ""
            share = self.overlength / max(rows + (self.overlength if done == "dropped" else 0), 1)
            head += f", {self.overlength:,} rows {done}{limit}: {share:.1%}"
        lines = [head]
        if rows:
            names = list(figures["tokens"]["prompt"])
            lines.append("  tokens    " + "".join(f"{name:>9}" for name in names))
            for side, values in figures["tokens"].items():
                cells = "".join(f"{value:>9,.0f}" for value in values.values())
                lines.append(f"  {side:<10}{cells}")
        if self.stats.near_duplicates:
            lines.append(
                f"  repeated prompts: {figures['repeated_prompts']:,}; similar to an earlier one: "
                f"{figures['near_duplicate_prompts']:,}"
            )
        if self.images is not None:
            pictures = figures["images"]
            lines.append(
                f"  images: {pictures['images']:,} in {pictures['rows']:,} of {rows:,} rows, "
                "counted as the tokens of prompts; batches with images keep their padding: "
                f"{positions['pad_share']:.0%} of positions in batches of {self.batch_size}"
            )
        elif positions["packed"]:
            total = positions["padded"] / positions["shared_prompts"]
            lines.append(
                f"  padding: {positions['pad_share']:.0%} of positions in batches of "
                f"{self.batch_size} {'pair' if self.batch_size == 1 else 'pairs'}; prompts computed once instead of twice: "
                f"{positions['sharing_factor']:.2f}x fewer tokens; both: {total:.2f}x"
            )
        if self.unused:
            lines.append(f"  not used: {_columns(self.unused)} text")
        start = len(self.name) + 2
        return lines + [f"  ! {line[start:]}" for line in self.findings]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _columns(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the column {names[0]} has"
    return f"the columns {', '.join(names)} have"


def log_report(logger: Any, reports: Sequence[DataReport], level: int | None = None) -> None:
    """
    Log reports: likely mistakes as warnings, all figures as one message at INFO.

    Args:
        logger (`logging.Logger`): For the warnings.
        reports (`Sequence[DataReport]`): The reports.
        level (`int`, *optional*): Level of the figures' logger; transformers' verbosity if not
            given.
    """
    for report in reports:
        for line in report.findings:
            logger.warning(line)
    if not reports:
        return
    if level is not None:
        FIGURES.setLevel(level)
    FIGURES.info("\n".join(map(str, reports)))


def report_rows(
    rows: Iterable[Row],
    processing_class: Any,
    *,
    max_length: int | None = None,
    name: str = "train_dataset",
    sample: int = SAMPLE,
    batch_size: int = 1,
    notes: RowNotes | None = None,
    policy: str = "truncate",
    max_prompt_length: int | None = None,
    images: Sequence[int] | None = None,
) -> DataReport:
    """
    Check prepared rows before training.

    Tokens are counted over all rows of a `Dataset`, from Arrow's columns. Texts, and rows of other
    types, are sampled.

    Args:
        rows (`Iterable[Mapping]`):
            Rows from [`~oddsmith.data.dataset.prepare_dataset`].
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        max_length (`int`, *optional*):
            Longest row; a row of this length can end without EOS because it was cut.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in the report.
        sample (`int`, *optional*, defaults to `2000`):
            Rows whose text is checked, spread over a `Dataset`; for other types, the first rows,
            for all figures.
        batch_size (`int`, *optional*, defaults to `1`):
            Pairs of a batch.
        notes ([`~oddsmith.data.notes.RowNotes`], *optional*):
            What the preparation found.
        policy (`str`, *optional*, defaults to `"truncate"`): `"truncate"` or `"drop"`.
        max_prompt_length (`int`, *optional*): What prompts of pairs that are too long are cut to.
        images (`Sequence[int]`, *optional*): Images of each row, if rows have images.

    Returns:
        [`DataReport`]: The report; its `findings` are empty if nothing is wrong.
    """
    whole, notes = isinstance(rows, Dataset), notes or RowNotes()
    stats = TokenStats(
        processing_class.bos_token_id,
        processing_class.eos_token_id,
        max_length,
        max_prompt_length=max_prompt_length,
    )
    with closing(stats):
        if whole:
            texts, start = _spread(cast(Dataset, rows), sample), 0
            for chunk in _chunks(cast(Dataset, rows)):
                end = start + len(chunk.chosen.lengths)
                stats.add(chunk, cut=None if notes.cut is None else notes.cut[start:end])
                start = end
        else:
            head = list(islice(iter(rows), sample))
            texts = list(enumerate(head))
            for start in range(0, len(head), CHUNK):
                stats.add(TokenRows.of_rows(head[start : start + CHUNK]))
    twice, of = count_texts(texts, repeats_prompt), len(texts)
    if notes.repeated and len(notes.repeated) > twice.count:
        twice, of = Finding(len(notes.repeated), notes.repeated[0]), notes.repeated_of
    return DataReport(
        name,
        stats,
        batch_size,
        {"prompt_twice": twice},
        of,
        notes.overlength,
        policy,
        partial=not whole and len(texts) == sample,
        unused=notes.unused,
        images=images,
    )


def _chunks(dataset: Dataset) -> Iterator[TokenRows]:
    columns = needed(dataset.column_names)
    for table in arrow_batches(dataset, columns, CHUNK):
        yield TokenRows.of_columns({name: Ragged.of_arrow(table[name]) for name in columns})


def _spread(dataset: Dataset, sample: int) -> list[tuple[int, Row]]:
    columns = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]
    if len(columns) < 3:
        return []
    texts = dataset.select_columns(columns).with_format(None)
    indices = range(len(dataset))
    if len(dataset) > sample:
        # In equal steps: files are often sorted by source, and a mistake may be in one source only.
        indices = [index * len(dataset) // sample for index in range(sample)]
        texts = texts.select(indices)
    return list(zip(indices, cast(Iterable[Row], texts), strict=True))


def count_texts(rows: Iterable[tuple[int, Row]], is_wrong: Callable[[Row], bool]) -> Finding:
    """Count faulty rows, and find the first."""
    found = [index for index, row in rows if is_wrong(row)]
    return Finding(len(found), found[0] if found else None)


def repeats_prompt(row: Row) -> bool:
    """Whether both answers of a row repeat its prompt."""
    texts = [text for key in TEXT_FIELDS if isinstance(text := row.get(key), str)]
    if len(texts) < 3:
        return False
    prompt, chosen, rejected = texts
    text = prompt.strip()
    if len(text) < _SHORTEST_PROMPT:
        return False
    # Both sides begin with it, possibly after a template's markers; an answer that quotes it does
    # not match.
    shared = common_prefix_length(chosen, rejected)
    return text in chosen[:shared]
