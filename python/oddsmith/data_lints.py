"""Start-up lints: what is likely wrong with prepared rows, in one line each."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset

from .chat import common_prefix_length

Row = Mapping[str, Any]

# Shorter prompts than this are found in many an answer.
_SHORTEST_PROMPT = 8


def lint_rows(
    rows: Iterable[Row],
    processing_class: Any,
    *,
    max_length: int | None = None,
    name: str = "train_dataset",
    sample: int = 2000,
) -> list[str]:
    """
    Look for the usual mistakes in prepared rows.

    Each finding is one line that counts the rows, names the first and says what to do. The share of
    rows that were cut or dropped is counted exactly, and logged, by
    [`~oddsmith.data.prepare_dataset`].

    Args:
        rows (`Iterable[Mapping]`):
            What [`~oddsmith.data.prepare_dataset`] returned.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        max_length (`int`, *optional*):
            Longest row; a row of that length may end without EOS because it was cut.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the dataset in the lines.
        sample (`int`, *optional*, defaults to `2000`):
            Rows to look at, spread over a `Dataset`, else the first ones.

    Returns:
        `list[str]`: The findings; empty if there are none.
    """
    picked = _pick(rows, sample)
    bos, eos = processing_class.bos_token_id, processing_class.eos_token_id
    findings = [
        (
            _repeats_prompt,
            "have the prompt twice, once in `prompt` and once inside chosen and rejected",
            "leave the `prompt` column out, or only keep the answers in chosen and rejected",
        ),
        (
            lambda row: _has_second_bos(row, bos, eos),
            "have more than one BOS token",
            "the text or the chat template writes it too: take it out there",
        ),
        (
            lambda row: _misses_eos(row, eos, max_length),
            "do not end in EOS",
            "end both answers with the tokenizer's EOS token, or the model never learns to stop",
        ),
        (
            lambda row: _completion(row, "chosen") == _completion(row, "rejected"),
            "have the same chosen and rejected completion",
            "they teach no preference: drop them",
        ),
        (
            lambda row: any(not _has_text(row, side, eos) for side in ("chosen", "rejected")),
            "have an empty completion",
            "drop them, or see that max_length leaves room for the answers",
        ),
        (
            lambda row: max_length is not None and _longest(row) > max_length,
            f"are longer than max_length {max_length} by their prompt alone, which TRL's rule "
            "keeps whole",
            "set max_prompt_length or overlength='drop'",
        ),
    ]
    lines = (
        []
        if eos is not None
        else [f"{name}: the tokenizer has no EOS token; set tokenizer.eos_token."]
    )
    return lines + [line for finding in findings if (line := _line(picked, name, *finding))]


def _pick(rows: Iterable[Row], sample: int) -> list[tuple[int, Row]]:
    if isinstance(rows, Dataset) and len(rows) > sample:
        # In equal steps: files are often sorted by source, and a mistake sits in one of them.
        indices = [index * len(rows) // sample for index in range(sample)]
        return list(zip(indices, rows.select(indices), strict=True))
    return list(enumerate(islice(iter(rows), sample)))


def _line(
    picked: list[tuple[int, Row]],
    name: str,
    is_wrong: Callable[[Row], bool],
    what: str,
    fix: str,
) -> str | None:
    found = [index for index, row in picked if is_wrong(row)]
    if not found:
        return None
    return f"{name}: {len(found)} of {len(picked)} rows {what} (first: row {found[0]}); {fix}."


def _repeats_prompt(row: Row) -> bool:
    prompt, chosen, rejected = (row[key] for key in ("prompt", "chosen", "rejected"))
    text = prompt.strip()
    if len(text) < _SHORTEST_PROMPT:
        return False
    # Both sides begin with it, perhaps after a template's markers: an answer that quotes it is no
    # match.
    shared = common_prefix_length(chosen, rejected)
    return text in chosen[:shared]


def _has_second_bos(row: Row, bos: int | None, eos: int | None) -> bool:
    if bos is None:
        return False
    if bos == eos:  # as in GPT-2, where it also separates and ends texts
        return _sequence(row, "chosen")[:2] == [bos, bos]
    return any(_sequence(row, side).count(bos) > 1 for side in ("chosen", "rejected"))


def _misses_eos(row: Row, eos: int | None, max_length: int | None) -> bool:
    if eos is None:
        return False
    sequences = [_sequence(row, side) for side in ("chosen", "rejected")]
    return any(
        ids[-1:] != [eos] for ids in sequences if max_length is None or len(ids) < max_length
    )


def _completion(row: Row, side: str) -> list[int]:
    return [label for label in row[f"{side}_labels"] if label >= 0]


def _has_text(row: Row, side: str, eos: int | None) -> bool:
    return any(token != eos for token in _completion(row, side))


def _longest(row: Row) -> int:
    return max(len(_sequence(row, "chosen")), len(_sequence(row, "rejected")))


def _sequence(row: Row, side: str) -> list[int]:
    # Encoder-decoder rows have the answer alone, as labels.
    return row.get(f"{side}_input_ids", row[f"{side}_labels"])
