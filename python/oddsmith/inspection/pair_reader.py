"""PairReader: the pairs of records, by the columns that their dataset has."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..data.layouts import Layout, find_layout, mapped_layout
from ..data.notes import RowNotes
from ..data.standard_rows import unused_text
from ..errors import UserError, user_errors
from ..sources.records import Record

logger = logging.get_logger(__name__)

# Records by which the layout is recognised.
_LOOKED_AT = 32


class PairReader:
    """
    Reads records as the trainer reads the rows of a dataset.

    Args:
        mapping (`Mapping[str, str]`): The user's names of columns.
        name (`str`): Name of the dataset.

    Attributes:
        notes ([`RowNotes`]): What was found.
    """

    def __init__(self, mapping: Mapping[str, str], name: str):
        self.mapping, self.name, self.notes = mapping, name, RowNotes()
        self._layout: Layout | None = None

    def read(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """
        The rows of some records, with `chosen`, `rejected` and, unless it is implicit, `prompt`.

        Raises:
            UserError: If a record cannot be read or has no pair.
        """
        for record in records:
            if record.fields is None:
                raise UserError(f"{record.where}: {record.problem}")
        rows = [record.fields or {} for record in records]
        first = self._layout is None
        layout = self._layout = self._layout or self._find(rows[:_LOOKED_AT])
        for record in records:
            for side in (layout.chosen, layout.rejected):
                if side not in (record.fields or {}):
                    raise UserError(
                        f"{record.where}: no field {side}; its fields are "
                        f"{', '.join(map(str, record.fields or {}))}; oddsmith prepare makes pairs "
                        "from other data"
                    )
        read = set(layout.sources)
        names = {
            name: target
            for name, target in self.mapping.items()
            if target not in layout.renames.values()
        }
        pairs = [
            {
                **{names.get(key, key): value for key, value in row.items() if key not in read},
                **layout.row(row),
            }
            for row in rows
        ]
        if first:
            self.notes.unused = unused_text(pairs[:_LOOKED_AT])
        return pairs

    def _find(self, rows: Sequence[Mapping[str, Any]]) -> Layout:
        with user_errors(""):
            if self.mapping:
                columns = dict.fromkeys(key for row in rows for key in row)
                return mapped_layout(self.mapping, columns, self.name)
            layout = find_layout(rows, what=self.name) or Layout()
        if str(layout):
            logger.warning(f"{self.name}: {layout}; --column_mapping names other columns.")
        return layout
