"""The tables of docs/distributed.md are those of the tests."""

from support import traffic
from support.engine_table import table
from support.paths import ROOT

PAGE = ROOT / "docs" / "distributed.md"


def test_the_table_of_engines():
    assert table() in PAGE.read_text(encoding="utf-8"), table()


def test_the_table_of_traffic():
    assert traffic.table() in PAGE.read_text(encoding="utf-8"), traffic.table()
