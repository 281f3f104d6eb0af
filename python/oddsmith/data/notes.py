"""RowNotes: what the preparation of a dataset found, for the report at the start."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .chat import is_messages


@dataclass
class RowNotes:
    """
    Findings about one dataset.

    Args:
        overlength (`int`, *optional*): Rows that were too long; None if not counted.
        cut (`np.ndarray`, *optional*): Which of the kept rows were cut, bool (rows,).
        unused (`tuple[str, ...]`, *optional*): Columns with text that is not trained on.
        repeated (`list[int]`, *optional*): Rows whose messages have the prompt twice.
        repeated_of (`int`, *optional*): Rows that were looked at for it.
    """

    overlength: int | None = None
    cut: np.ndarray | None = None
    unused: tuple[str, ...] = ()
    repeated: list[int] = field(default_factory=list)
    repeated_of: int = 0

    def look_for_repeats(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Adds numbered rows with the prompt twice, as messages; for text the report does it."""
        for number, row in rows:
            self.repeated_of += 1
            if repeats_messages(row):
                self.repeated.append(number)


def repeats_messages(row: Mapping[str, Any]) -> bool:
    """Whether both answers of a row begin with the messages of its prompt column."""
    prompt, *sides = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if not is_messages(prompt):
        return False
    start = _said(prompt)
    return all(is_messages(side) and _said(side[: len(start)]) == start for side in sides)


def _said(messages: Iterable[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(message.get("role"), message.get("content")) for message in messages]
