"""Input rows of `oddsmith prepare`, and their pairs."""

import pytest

from oddsmith.errors import UserError
from oddsmith.prepare.formats import ReadOptions, read_units
from oddsmith.prepare.pair import assistant, user
from oddsmith.prepare.scored import Columns
from oddsmith.sources.records import Record


def read(rows, **options):
    columns = Columns(**options.pop("columns", {}))
    records = [Record(row, "rows.jsonl", "line", index + 1) for index, row in enumerate(rows)]
    return read_units(records, ReadOptions(columns=columns, **options))


def pairs_of(rows, **options):
    """Format, and for each unit its pairs as (prompt, chosen, rejected), or its reason."""
    kind, units = read(rows, **options)
    return kind, [
        [(pair.prompt, pair.chosen, pair.rejected) for pair in unit.pairs] or unit.reason
        for unit in units
    ]


def bad(row, **options):
    with pytest.raises(UserError) as error:
        list(read([row], **options)[1])
    # The same row, dropped instead: counted, with its reason.
    _, units = read([row], **{**options, "stop_at_bad_rows": False})
    assert [(unit.reason, unit.rows) for unit in units] == [("bad row", 1)]
    assert str(error.value).startswith("rows.jsonl line 1: ")
    return str(error.value)


TALK = [user("Hi"), assistant("Hello"), user("Tea?")]
