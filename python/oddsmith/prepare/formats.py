"""Formats of datasets, and the parser of each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ..data.layouts import find_sides
from ..errors import UserError
from ..sources.records import Record
from .answer_columns import describe, find_columns
from .comparisons import find_comparison, parse_comparison
from .grouped import group_responses
from .pair import BadRow, Unit, per_record
from .ready import is_dialogue, pair_layout, parse_hh, parse_pair
from .scored import PAIRINGS, Columns, parse_scored, parse_ultrafeedback
from .trees import read_flat_messages, read_ready_trees

# The name of a row of each format in the summary.
FORMATS = {
    "pairs": "rows with chosen and rejected (such as UltraFeedback-binarized)",
    "hh": "rows with two dialogues (HH-RLHF)",
    "comparisons": "two answers and a verdict (SHP, SafeRLHF, WebGPT, Chatbot Arena, ..)",
    "ultrafeedback": "prompts with completions and their ratings (UltraFeedback)",
    "oasst": "messages (OpenAssistant, flat)",
    "oasst_trees": "messages (OpenAssistant, ready trees)",
    "scored": "prompts with scored or ranked responses",
    "responses": "scored or ranked responses",
}


@dataclass(frozen=True)
class ReadOptions:
    """
    Options of reading input.

    Args:
        format (`str`, *optional*, defaults to `"auto"`): One of `FORMATS`, or `"auto"`: detected
            from the first row.
        pairing (`str`, *optional*, defaults to `"best_worst"`): See `draw_pairs`.
        stop_at_bad_rows (`bool`, *optional*, defaults to `True`): Stop; otherwise bad rows are
            counted.
        columns (`Columns`, *optional*): Names of the columns of `scored` and `responses`.
        folder (`Path`, *optional*): Folder of temporary files.

    Raises:
        ValueError: If a value is not allowed, or the columns do not fit the format.
    """

    format: str = "auto"
    pairing: str = "best_worst"
    stop_at_bad_rows: bool = True
    columns: Columns = field(default_factory=Columns)
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; must be auto, {', '.join(FORMATS)}")
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing is {self.pairing!r}; must be {', '.join(PAIRINGS)}")
        columns = self.columns
        if columns.responses and columns.response:
            raise ValueError(
                "responses_column (a list per row) and response_column (one answer per row) are two "
                "formats; name one"
            )
        kind = self.format
        if kind == "auto":
            kind = "scored" if columns.responses else "responses" if columns.response else kind
        ordered = columns.scores or columns.ranks or columns.score_key or columns.rank_key
        if kind == "scored" and not (columns.responses and ordered):
            raise ValueError(
                "format 'scored' needs responses_column, and scores_column, ranks_column, "
                "score_key or rank_key"
            )
        if kind == "responses" and not (columns.response and (columns.scores or columns.ranks)):
            raise ValueError(
                "format 'responses' needs response_column, and scores_column or ranks_column"
            )


def detect_format(fields: Mapping[str, Any], columns: Columns, where: str) -> str:
    """
    The format of a row.

    Raises:
        UserError: If it is none of `FORMATS`; the message has the columns and the flags.
    """
    if columns.responses:
        return "scored"
    if columns.response:
        return "responses"
    if find_sides(fields):
        both = is_dialogue(fields.get("chosen")) and is_dialogue(fields.get("rejected"))
        named = columns.prompt != "prompt" or fields.get("prompt") is not None
        return "hh" if both and not named else "pairs"
    if find_comparison(fields):
        return "comparisons"
    if "instruction" in fields and "completions" in fields:
        return "ultrafeedback"
    if "message_id" in fields and "role" in fields:
        return "oasst"
    if isinstance(fields.get("prompt"), Mapping) and "message_tree_id" in fields:
        return "oasst_trees"
    found = find_columns(fields, columns)
    if found is not None:
        return "scored" if found.responses else "responses"
    raise UserError(
        f"{where}: the format cannot be detected from the columns {', '.join(map(str, fields))}; give "
        "--format, or name the columns of scored answers: --responses_column or "
        "--response_column, with --scores_column or --ranks_column"
    )


def read_units(records: Iterable[Record], options: ReadOptions) -> tuple[str, Iterator[Unit]]:
    """
    The format of the input, and its units, read lazily.

    Raises:
        UserError: If the format cannot be detected; while reading, for bad rows, unless they are
            counted.
    """
    records = iter(records)
    kind, head = options.format, []
    if kind == "auto":
        for record in records:
            head.append(record)
            if record.fields is not None:
                kind = detect_format(record.fields, options.columns, record.where)
                options = _with_columns(kind, record.fields, options)
                break
            if options.stop_at_bad_rows:
                raise UserError(f"{record.where}: {record.problem}")
            if len(head) == 100:
                raise UserError(f"{record.where}: none of the first 100 lines can be read")
    return kind, _read(kind, chain(head, records), options)


def _with_columns(kind: str, fields: Mapping[str, Any], options: ReadOptions) -> ReadOptions:
    columns = options.columns
    if kind in ("scored", "responses") and not (columns.responses or columns.response):
        return replace(options, columns=find_columns(fields, columns) or columns)
    return options


def columns_taken(kind: str, fields: Mapping[str, Any], options: ReadOptions) -> str:
    """
    What the columns of a row were taken for, in one line; empty if they have the format's names.

    Args:
        kind (`str`): One of `FORMATS`, from [`read_units`].
        fields (`Mapping[str, Any]`): The row.
        options ([`ReadOptions`]): As given to it.
    """
    if kind == "pairs":
        try:
            return str(pair_layout(fields, options.columns.prompt))
        except BadRow:
            return ""
    if kind == "comparisons":
        return str(find_comparison(fields) or "")
    found = _with_columns(kind, fields, options).columns
    return describe(found) if found != options.columns else ""


def _read(kind: str, records: Iterator[Record], options: ReadOptions) -> Iterator[Unit]:
    stop, columns, pairing = options.stop_at_bad_rows, options.columns, options.pairing
    if kind == "oasst":
        return read_flat_messages(records, pairing, stop, options.folder)
    if kind == "oasst_trees":
        return read_ready_trees(records, pairing, stop)
    if kind == "responses":
        return group_responses(records, columns, pairing, stop, options.folder)
    parsers = {
        "hh": partial(parse_hh, lang_column=columns.lang),
        "comparisons": partial(parse_comparison, lang_column=columns.lang),
        "pairs": partial(parse_pair, lang_column=columns.lang, prompt_column=columns.prompt),
        "scored": partial(parse_scored, columns=columns, pairing=pairing),
        "ultrafeedback": partial(parse_ultrafeedback, pairing=pairing),
    }
    # If no row can be read, any parser will do.
    return per_record(records, parsers.get(kind, parse_pair), stop)
