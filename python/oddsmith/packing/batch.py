"""PackedBatch: preference pairs as one row of tokens without padding, each prompt once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

SharePrompt = bool | Literal["auto"]


def check_share_prompt(value: Any) -> SharePrompt:
    """The value, if it is one that there is.

    Raises:
        ValueError: If it is not; 0 and 1 are none.
    """
    if value is True or value is False or value == "auto":
        return value
    raise ValueError(f"share_prompt is {value!r}; must be True, False or 'auto'")


# "auto" shares a prompt that is at least this part of its pair's tokens: for less, the second
# attention call of the rejected answer costs more than the tokens.
_WORTH_SHARING = 0.05

_COLUMNS = tuple(
    f"{side}_{column}"
    for side in ("chosen", "rejected")
    for column in ("input_ids", "attention_mask", "labels")
)


@dataclass(frozen=True)
class PackedBatch:
    """
    B pairs in one row of N tokens, `[prompt | chosen | rejected]` for each pair.

    The rejected part starts with the last token of the prompt, at that token's position, so that
    every row of it predicts its right neighbour. A pair without a shared prompt is two complete
    sequences, `[chosen sequence | rejected sequence]`.

    Args:
        input_ids (`Tensor`): `(1, N)` `int64`.
        position_ids (`Tensor`): Position of each token in its sequence, `(1, N)`.
        segments (`tuple[tuple[int, int, int], ...]`):
            For each pair the number of shared tokens, and of the other tokens of its chosen and its
            rejected sequence. They sum to N.
        rows (`Tensor`):
            Positions in the packed row that have a successor, `(M,)`. Those of a shared prompt come
            twice, once for each sequence.
        targets (`Tensor`): The successors, `(M,)`.
        sequence (`Tensor`): Sequence of each row, `(M,)`: chosen ones 0..B, rejected ones B..2B.
        completion (`Tensor`): Whether the target is a completion token, `(M,)`.
        num_scored (`dict[str, int]`):
            Rows in the loss, for each `nll_scope`; computed here to avoid waiting for a device.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[tuple[int, int, int], ...]
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    completion: Tensor
    num_scored: dict[str, int]
    _source: tuple[tuple[Tensor, int], ...] = ()

    @classmethod
    def build(
        cls, pairs: Sequence[Mapping[str, Sequence[int]]], share_prompt: SharePrompt
    ) -> PackedBatch:
        """
        From rows of a prepared dataset.

        Args:
            pairs (`Sequence[Mapping]`):
                `chosen_input_ids`, `chosen_labels`, `rejected_input_ids` and `rejected_labels` of
                each pair, without padding; negative labels are not completion.
            share_prompt (`bool` or `"auto"`):
                Whether to compute the common beginning of a pair's sequences once; `"auto"`: if
                that saves at least 5 % of the pair's tokens.

        Raises:
            ValueError: If ids and labels of a sequence differ in length, a sequence is empty, or
                `share_prompt` is another value.
        """
        check_share_prompt(share_prompt)
        ids, positions, segments, parts, offset = [], [], [], [], 0
        for index, pair in enumerate(pairs):
            chosen, rejected = (_sequence(pair, side, index) for side in ("chosen", "rejected"))
            shared = _shared(chosen, rejected, share_prompt)
            length, left = len(chosen.ids), len(rejected.ids) - shared
            place = np.arange(offset, offset + length)
            own = np.arange(offset + length, offset + length + left)
            parts.append((chosen, place, index))
            parts.append((rejected, np.concatenate([place[:shared], own]), len(pairs) + index))
            ids += chosen.ids, rejected.ids[shared:]
            positions += np.arange(length), np.arange(shared, shared + left)
            segments.append((shared, length - shared, left))
            offset += length + left
        rows = {
            "rows": [place[:-1] for _, place, _ in parts],
            "targets": [side.ids[1:] for side, _, _ in parts],
            "sequence": [np.full(len(side.ids) - 1, number) for side, _, number in parts],
            "completion": [side.completion[1:] for side, _, _ in parts],
        }
        answers = sum(int(each.sum()) for each in rows["completion"])
        prompts = sum(int((~each).sum()) for each in rows["completion"][::2])
        joined = {name: torch.from_numpy(np.concatenate(each)) for name, each in rows.items()}
        return cls(
            input_ids=torch.from_numpy(np.concatenate(ids))[None],
            position_ids=torch.from_numpy(np.concatenate(positions))[None],
            segments=tuple(segments),
            num_scored={"full": prompts + answers, "completion": answers},
            rows=joined["rows"],
            targets=joined["targets"],
            sequence=joined["sequence"],
            completion=joined["completion"],
        )

    @classmethod
    def from_padded(cls, batch: Mapping[str, Any], share_prompt: SharePrompt) -> PackedBatch:
        """From a padded batch of any collator: `chosen_*`, `rejected_*`."""
        device, columns = batch["chosen_input_ids"].device, {}
        for side in ("chosen", "rejected"):
            real = (batch[f"{side}_attention_mask"] != 0).cpu()
            for name in (f"{side}_input_ids", f"{side}_labels"):
                rows = zip(batch[name].cpu(), real, strict=True)
                columns[name] = [row[kept].numpy() for row, kept in rows]
        pairs = [dict(zip(columns, pair, strict=True)) for pair in zip(*columns.values())]
        return cls.build(pairs, share_prompt).to(device)

    def made_of(self, batch: Mapping[str, Any]) -> PackedBatch:
        """Stores the padded columns of the same pairs."""
        columns = (batch[name] for name in _COLUMNS)
        return replace(self, _source=tuple((column, column._version) for column in columns))

    def is_made_of(self, batch: Mapping[str, Any]) -> bool:
        """Whether the padded columns are unchanged: not replaced and not written to."""
        if any(column._version != version for column, version in self._source):
            return False
        pairs = [(column, batch.get(name)) for name, (column, _) in zip(_COLUMNS, self._source)]
        # The DataLoader's pinned copies count as unchanged; comparing values would wait for the
        # device.
        return bool(pairs) and all(
            now is column
            or (torch.is_tensor(now) and now.device.type == "cpu" and torch.equal(column, now))
            for column, now in pairs
        )

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device, as `Tensor.to`."""
        return self._mapped(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory; the DataLoader calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Any) -> PackedBatch:
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


@dataclass(frozen=True)
class _Sequence:
    ids: np.ndarray  # (T,) int64
    completion: np.ndarray  # (T,) bool


def _sequence(pair: Mapping[str, Sequence[int]], side: str, index: int) -> _Sequence:
    ids = np.asarray(pair[f"{side}_input_ids"], dtype=np.int64)
    labels = np.asarray(pair[f"{side}_labels"], dtype=np.int64)
    if ids.shape != labels.shape or len(ids) == 0:
        raise ValueError(
            f"pair {index} of the batch: {side}_input_ids has {len(ids)} tokens and {side}_labels "
            f"{len(labels)}; must be the same number, at least one"
        )
    return _Sequence(ids, labels >= 0)


def shared_length(chosen: _Sequence, rejected: _Sequence) -> int:
    """
    Tokens of a pair that can be computed once.

    Both sequences begin with them. The rest of the rejected sequence begins with the last token of
    the prompt, because the row of that token is scored for each sequence.
    """
    answer = int(rejected.completion.argmax()) if rejected.completion.any() else len(rejected.ids)
    most = min(len(chosen.ids), answer - 1)
    if most <= 0:
        return 0
    equal = chosen.ids[:most] == rejected.ids[:most]
    return most if equal.all() else int(equal.argmin())


def _shared(chosen: _Sequence, rejected: _Sequence, share_prompt: SharePrompt) -> int:
    if share_prompt is False:
        return 0
    shared = shared_length(chosen, rejected)
    total = len(chosen.ids) + len(rejected.ids)
    return 0 if share_prompt == "auto" and shared < _WORTH_SHARING * total else shared
