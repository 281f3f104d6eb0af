"""The table of docs/distributed.md is that of the tests."""

from support.engine_cells import table
from support.paths import ROOT

PAGE = ROOT / "docs" / "distributed.md"


def test_the_table():
    assert table() in PAGE.read_text(encoding="utf-8"), table()
