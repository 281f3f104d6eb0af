"""Decides whether a model's batches can be packed rows: by its structure, then by a trial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..packing.batch import PackedBatch
from .attention_names import attention_name, plain_attention
from .model_attention import CannotPack, PackedRow, why_not
from .model_structure import in_memory, is_exact, is_foreign, mixer, strange
from .packed_trial import (
    DIFFERS,
    EXACT,
    FAILS,
    LONGEST,
    MOST,
    Blind,
    lengths_up_to,
    tokens_of,
    try_out,
)
from .random_draws import draws_for_tokens
from .small_model import NotSmall, longest_position, reaches, small_model, spreads

__all__ = ["CannotPack", "RowLimits", "check"]

# Of the coarsest dtype's precision, for a model that its small form has already shown to be right.
_LOOSE = 16.0
_RANDOM = "in training it draws random numbers for each token, others for a packed row"
# Tokens of the longest sequence that a model with code of its own is tried with.
_FOREIGN_LONGEST = 2048


class RowLimits(NamedTuple):
    """
    For which rows a model's results are those of a padded batch.

    Args:
        sequence (`int`, *optional*): Tokens of the longest sequence; None if there is no limit.
        row (`int`, *optional*): Tokens of the row.
    """

    sequence: int | None = None
    row: int | None = None

    def allow(self, batch: PackedBatch) -> bool:
        """Whether a batch is within them."""
        longest = max(shared + max(sides) for shared, *sides in batch.segments)
        tokens = batch.input_ids.numel()
        return (self.sequence is None or longest <= self.sequence) and (
            self.row is None or tokens <= self.row
        )

    def within(self, other: RowLimits) -> RowLimits:
        """The stricter of two limits."""
        both = zip(self, other)
        return RowLimits(*(min((x for x in pair if x is not None), default=None) for pair in both))

    def __str__(self) -> str:
        parts = []
        if self.sequence is not None:
            parts.append(f"sequences of up to {self.sequence:,} tokens")
        if self.row is not None:
            parts.append(f"batches of up to {self.row:,} tokens")
        return " and ".join(parts)


def check(core: Any) -> RowLimits:
    """
    Checks whether a model gives the same results on a packed row as on a padded batch. Nothing is
    changed.

    A small model of the same class and configuration decides, in `float32`. The model itself is run
    only if it has parts that its class has not, or if there is no small model.

    What in transformers' models depends on a length has a known name in their configuration. A model with
    code of its own is tried with long rows too, and packed for rows of up to this length.

    Args:
        core (`PreTrainedModel`): The model, without wrappers.

    Returns:
        [`RowLimits`]: The rows for which the results are the same.

    Raises:
        [`CannotPack`]: With the reason, if they are not.
    """
    PackedRow(())  # the table of attention functions can be changed
    unknown = why_not(attention_name(core))
    if unknown is not None:
        raise CannotPack(unknown)
    part = mixer(core)
    if part is not None:
        raise CannotPack(f"its {part}, which would mix the sequences of a packed row")
    try:
        small, limits = _small(core)
    except NotSmall as none:
        return _check_alone(core, str(none))
    if is_foreign(core):
        limits = limits.within(_check_long(small))
    odd = strange(core, small)
    if odd is not None:
        _check_itself(core, odd)
    return limits


def _small(core: Any) -> tuple[Any, RowLimits]:
    """A small model, and the rows for which its results are right."""
    failure, reason = "", None
    for deep in (False, True):
        for limits, options in _attempts(core):
            try:
                small = small_model(core, deep=deep, **options)
                reason = try_out(small, reference=plain_attention(small))
            except NotSmall as error:
                failure = str(error)
                break
            except Blind:
                failure, reason = "it gives no clear results", None
                break
            if reason is None and draws_for_tokens(small):
                reason = _RANDOM
            if reason is None:
                return small, limits
            if reason != DIFFERS:
                break
        if reason is not None and not reason.startswith(FAILS):
            break  # else the class may need all its layers
    if reason is not None:
        raise CannotPack(reason)
    raise NotSmall(failure)


def _check_long(small: Any) -> RowLimits:
    """Of a small model that has passed a trial with short rows: the limits of trials with longer ones."""
    longest = min(_FOREIGN_LONGEST, longest_position(small.config) or _FOREIGN_LONGEST)
    limits = RowLimits(longest, tokens_of(lengths_up_to(longest)))
    # A row is nearly seven times as long as its longest sequence. So each length at which the model could
    # change is between those of the two in one of the trials.
    while longest > LONGEST:
        lengths = lengths_up_to(longest)
        try:
            reason = try_out(small, reference=plain_attention(small), lengths=lengths)
        except Blind:
            reason = "it gives no clear results"
        if reason is not None:
            raise CannotPack(
                "its code is not transformers' own, and in a row of "
                f"{tokens_of(lengths):,} tokens: {reason}"
            )
        longest //= 6
    return limits


def _attempts(core: Any) -> Iterator[tuple[RowLimits, dict[str, int]]]:
    """What to scale down in a small model, and what is known if it then passes."""
    windows, places = reaches(core.config), spreads(core.config)
    yield RowLimits(), {}
    # Windows as long as the sequences of a trial, whose row is longer; distances beyond its row.
    far, wide = {"reach": LONGEST}, {"spread": MOST + 1}
    if windows:
        yield RowLimits(sequence=min(windows)), far
    if places:
        yield RowLimits(row=min(places) - 1), wide
    if windows and places:
        yield RowLimits(min(windows), min(places) - 1), far | wide


def _check_itself(core: Any, odd: str) -> None:
    """Of a model that is not quite what its class is."""
    if not in_memory(core):
        raise CannotPack(f"{odd}, and its weights are not in memory to try it out")
    reason = _tried(core, _LOOSE)
    if reason is not None:
        raise CannotPack(reason)


def _check_alone(core: Any, why: str) -> RowLimits:
    """Of a model without a small form."""
    if not in_memory(core):
        raise CannotPack(
            f"a packed row cannot be tried out: its weights are not in memory, and a small model of "
            f"its class cannot be built ({why})"
        )
    if is_foreign(core):
        raise CannotPack(
            "its code is not transformers' own, and it cannot be tried out with long rows: a small model "
            f"of its class cannot be built ({why})"
        )
    if not is_exact(core):
        raise CannotPack(
            f"a packed row cannot be tried out: in less than float32 it proves nothing, and a small "
            f"model of its class cannot be built ({why})"
        )
    reason = _tried(core, EXACT)
    if reason is None and core.device.type == "cpu" and draws_for_tokens(core):
        reason = _RANDOM
    if reason is None and (reaches(core.config) or spreads(core.config)):
        reason = "its windows or chunks are longer than a trial"
    if reason is not None:
        raise CannotPack(reason)
    return RowLimits()


def _tried(core: Any, room: float) -> str | None:
    try:
        return try_out(core, room)
    except Blind:
        return "its results hardly depend on the tokens, so a trial proves nothing"
