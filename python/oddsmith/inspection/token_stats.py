"""Exact figures of tokenised pairs, chunk by chunk, from numeric columns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from ..data.duplicates import KeyIndex, NearDuplicates, sequence_keys, sketch_tokens

# Prompts with at least this similarity are near duplicates.
NEAR = 0.8


@dataclass
class Ragged:
    """
    Concatenated sequences of different lengths.

    Args:
        values (`np.ndarray`): All elements, integers.
        lengths (`np.ndarray`): Length of each sequence, int64 (n,).
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum())), lengths)

    @classmethod
    def of_arrow(cls, column: Any) -> "Ragged":
        """From a `pyarrow.ChunkedArray` of lists of integers, without Python objects."""
        import pyarrow.compute as pc

        lengths = pc.fill_null(pc.call_function("list_value_length", [column]), 0)
        lengths = lengths.to_numpy().astype(np.int64)
        return cls(pc.call_function("list_flatten", [column]).to_numpy(), lengths)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def sums(self, mask: np.ndarray) -> np.ndarray:
        """Number of elements of each sequence that a mask over `values` selects, int64 (n,)."""
        total = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        return total[self.starts + self.lengths] - total[self.starts]

    def where(self, mask: np.ndarray) -> "Ragged":
        """The elements that a mask over `values` selects."""
        return Ragged(self.values[mask], self.sums(mask))

    def at(self, place: int) -> np.ndarray:
        """Element at index `place` (from the end if negative) of each sequence; -1 if missing."""
        index = self.starts + (place if place >= 0 else self.lengths + place)
        there = self.lengths >= (place + 1 if place >= 0 else -place)
        found = np.full(len(self.lengths), -1, np.int64)
        found[there] = self.values[index[there]]
        return found


@dataclass
class TokenRows:
    """
    Some tokenised pairs.

    Args:
        prompt (`Ragged`): Tokens of the prompt before the chosen answer.
        chosen (`Ragged`): Tokens of the chosen answer.
        rejected (`Ragged`): Tokens of the rejected answer.
        chosen_prompt (`np.ndarray`): Prompt tokens of the chosen sequence, int64 (n,).
        rejected_prompt (`np.ndarray`): Prompt tokens of the rejected sequence; a last token may
            have merged with one of the answers.
        encoder_decoder (`bool`): Prompt and answers are separate sequences, without added BOS and
            EOS.
    """

    prompt: Ragged
    chosen: Ragged
    rejected: Ragged
    chosen_prompt: np.ndarray
    rejected_prompt: np.ndarray
    encoder_decoder: bool = False

    @classmethod
    def of_columns(cls, columns: Mapping[str, Ragged]) -> "TokenRows":
        """From the columns of [`~oddsmith.data.dataset.prepare_dataset`]; see `COLUMNS`."""
        labels = [columns[f"{side}_labels"] for side in ("chosen", "rejected")]
        chosen, rejected = (each.where(each.values >= 0) for each in labels)
        ids = columns.get("chosen_input_ids")
        if ids is None:
            prompt = columns["prompt_input_ids"]
            return cls(
                prompt, chosen, rejected, prompt.lengths, prompt.lengths, encoder_decoder=True
            )
        return cls(
            ids.where(labels[0].values < 0),
            chosen,
            rejected,
            labels[0].lengths - chosen.lengths,
            labels[1].lengths - rejected.lengths,
        )

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "TokenRows":
        """From rows with these columns as lists."""
        return cls.of_columns(
            {name: Ragged.of_lists([row[name] for row in rows]) for name in needed(rows[0])}
        )


def needed(columns: Iterable[str]) -> list[str]:
    """The columns of a row that the figures need."""
    columns = set(columns)
    first = "chosen_input_ids" if "chosen_input_ids" in columns else "prompt_input_ids"
    return [first, "chosen_labels", "rejected_labels"]


@dataclass
class Finding:
    """Number of rows with a fault, and the first of them."""

    count: int = 0
    first: int | None = None

    def add(self, mask: np.ndarray, numbers: np.ndarray) -> None:
        """
        Counts rows of a chunk.

        Args:
            mask (`np.ndarray`): Which rows have the fault, bool (n,).
            numbers (`np.ndarray`): Numbers of the rows, (n,).
        """
        self.count += int(mask.sum())
        if self.first is None and mask.any():
            self.first = int(numbers[mask.argmax()])


@dataclass
class TokenStats:
    """
    Figures of all rows that are added.

    Memory grows by 24 bytes per row (the lengths) and, with sketches, by up to 100 MB in total; the
    other sketches are in temporary files.

    Args:
        bos, eos (`int`, *optional*): Token ids of the tokenizer.
        max_length (`int`, *optional*): Longest sequence.
        max_prompt_length (`int`, *optional*): What prompts of pairs that are too long are cut to.
        near_duplicates (`bool`, *optional*, defaults to `True`): Look for repeated prompts.
    """

    bos: int | None = None
    eos: int | None = None
    max_length: int | None = None
    near_duplicates: bool = True
    max_prompt_length: int | None = None
    rows: int = 0
    identical: Finding = field(default_factory=Finding)
    empty: Finding = field(default_factory=Finding)
    double_bos: Finding = field(default_factory=Finding)
    missing_eos: Finding = field(default_factory=Finding)
    too_long: Finding = field(default_factory=Finding)
    no_context: Finding = field(default_factory=Finding)
    repeated: Finding = field(default_factory=Finding)
    similar: Finding = field(default_factory=Finding)

    def __post_init__(self) -> None:
        self._lengths: list[np.ndarray] = []
        self._prompts = KeyIndex()
        self._near = NearDuplicates(NEAR) if self.near_duplicates else None

    def add(
        self,
        rows: TokenRows,
        numbers: np.ndarray | None = None,
        cut: np.ndarray | None = None,
    ) -> None:
        """
        Adds a chunk of rows.

        Args:
            rows ([`TokenRows`]): The rows, in order.
            numbers (`np.ndarray`, *optional*): Row numbers for findings; consecutive if not given.
            cut (`np.ndarray`, *optional*): Which rows were cut to length, bool (n,); those of the
                lengths that cut rows have if not given.
        """
        count = len(rows.chosen.lengths)
        if numbers is None:
            numbers = np.arange(self.rows, self.rows + count)
        self.rows += count
        answers = (rows.chosen, rows.rejected)
        before = (rows.chosen_prompt, rows.rejected_prompt)
        totals = [place + answer.lengths for place, answer in zip(before, answers, strict=True)]
        # The common beginning of both sequences, which can be computed once.
        shared = np.minimum(*before)
        self._lengths.append(np.stack([shared, *totals], 1).astype(np.int32))
        keys = [sequence_keys(answer.values, answer.lengths) for answer in answers]
        self.identical.add(keys[0] == keys[1], numbers)
        texts = [
            answer.lengths if self.eos is None else answer.sums(answer.values != self.eos)
            for answer in answers
        ]
        self.empty.add((texts[0] == 0) | (texts[1] == 0), numbers)
        if not rows.encoder_decoder:
            self.double_bos.add(self._second_bos(rows), numbers)
            self.missing_eos.add(self._without_eos(rows, totals, cut), numbers)
            self.no_context.add(shared == 0, numbers)
            if self.max_length is not None:
                self.too_long.add(np.maximum(*totals) > self.max_length, numbers)
        if self._near is not None:
            self._look_for_repeats(rows.prompt, numbers, self._near)

    def _second_bos(self, rows: TokenRows) -> np.ndarray:
        if self.bos is None:
            return np.zeros(len(rows.chosen.lengths), bool)
        if self.bos == self.eos:  # as in GPT-2, where it also separates and ends texts
            return (rows.prompt.at(0) == self.bos) & (rows.prompt.at(1) == self.bos)
        counts = [
            part.sums(part.values == self.bos) for part in (rows.prompt, rows.chosen, rows.rejected)
        ]
        return (counts[0] + counts[1] > 1) | (counts[0] + counts[2] > 1)

    def _without_eos(
        self, rows: TokenRows, totals: list[np.ndarray], cut: np.ndarray | None
    ) -> np.ndarray:
        missing = np.zeros(len(totals[0]), bool)
        if self.eos is None:
            return missing
        for answer, total in zip((rows.chosen, rows.rejected), totals, strict=True):
            last = answer.at(-1)
            last = np.where(answer.lengths > 0, last, rows.prompt.at(-1))
            missing |= (last != self.eos) & ~self._may_be_cut(answer.lengths, total)
        return missing if cut is None else missing & ~cut

    def _may_be_cut(self, answers: np.ndarray, totals: np.ndarray) -> np.ndarray:
        if self.max_length is None:
            return np.zeros(len(totals), bool)
        cut = totals >= self.max_length
        if self.max_prompt_length is not None:
            cut |= answers == self.max_length - self.max_prompt_length
        return cut

    def _look_for_repeats(self, prompt: Ragged, numbers: np.ndarray, near: NearDuplicates) -> None:
        keys = sequence_keys(prompt.values, prompt.lengths)
        repeated = self._prompts.find(keys) >= 0
        for row, key in enumerate(keys.tolist()):
            if self._prompts.find_recent(key) >= 0:
                repeated[row] = True
            elif not repeated[row]:
                self._prompts.add(key, row)
        self._prompts.settle()
        self.repeated.add(repeated, numbers)
        # A repeated prompt is not also counted as similar.
        fresh = np.flatnonzero(~repeated)
        similar = np.zeros(len(keys), bool)
        if len(fresh):
            kept = Ragged(
                prompt.values[np.repeat(~repeated, prompt.lengths)], prompt.lengths[fresh]
            )
            similar[fresh] = near.find_and_add(sketch_tokens(kept.values, kept.lengths)) >= 0
        self.similar.add(similar, numbers)

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shared tokens of both sequences of each row, and all their tokens; int32 (rows,)."""
        if not self._lengths:
            none = np.zeros(0, np.int32)
            return none, none, none
        joined = np.concatenate(self._lengths)
        self._lengths = [joined]
        return joined[:, 0], joined[:, 1], joined[:, 2]

    def close(self) -> None:
        """Remove the temporary files."""
        if self._near is not None:
            self._near.close()


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Minimum, quantiles, maximum and mean of some lengths."""
    if not len(values):
        return {}
    places = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found = np.quantile(values, list(places.values()), method="inverted_cdf").tolist()
    return {**dict(zip(places, found, strict=True)), "mean": round(float(values.mean()), 1)}


def padded_tokens(chosen: np.ndarray, rejected: np.ndarray, batch_size: int, seed: int = 0) -> int:
    """
    Positions of all batches of an epoch when they are padded as TRL does: both sides of a batch to
    the longest sequence in it, rows in random order.

    Args:
        chosen (`np.ndarray`): Lengths of the chosen sequences, (rows,).
        rejected (`np.ndarray`): Lengths of the rejected sequences, (rows,).
        batch_size (`int`): Pairs per batch.
        seed (`int`, *optional*): Seed of the order.

    Returns:
        `int`: Positions.
    """
    longest = np.maximum(chosen, rejected).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(longest))
    starts = np.arange(0, len(longest), batch_size)
    sizes = np.diff(np.append(starts, len(longest)))
    return (
        int((np.maximum.reduceat(longest[order], starts) * sizes).sum() * 2) if len(longest) else 0
    )
