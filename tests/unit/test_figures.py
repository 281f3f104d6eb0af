"""Every measured figure of README.md and docs/ is that of a row of benches/results.csv."""

import csv
import re

import pytest

from support.figures import blocks, faults
from support.paths import BENCHES, ROOT

with (BENCHES / "results.csv").open(newline="", encoding="utf-8") as file:
    TABLE = list(csv.DictReader(file))
ROWS = {row["id"]: row for row in TABLE}
# What was tried and left out is not in the code any more, so no benchmark can repeat its figures.
PAGES = sorted(
    {ROOT / "README.md", *ROOT.glob("docs/**/*.md")} - {ROOT / "docs/negative_results.md"}
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_is_that_of_a_row(page):
    assert not faults(page.read_text(encoding="utf-8"), ROWS)


def test_the_readme_has_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = [block for block in blocks(readme) if block.ids]
    assert sum(len(list(block.figures())) for block in measured) > 10


def test_rows_are_whole():
    assert len(ROWS) == len(TABLE) > 100
    benches = {path.stem for path in BENCHES.glob("bench_*.py")} | {"gpu"}
    for row in TABLE:
        assert re.fullmatch(r"[a-z0-9_.-]+", row["id"]), row
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]), row
        assert row["bench"] in benches, row
        assert all(row[key] for key in ("case", "implementation", "metric", "unit", "machine")), row
        assert "torch=" in row["versions"], row
        # Rows from before there was this file have a median alone.
        spread = [float(row[key]) for key in ("p20", "p50", "p80") if row[key]]
        assert len(spread) in (1, 3) and spread == sorted(spread), row


# ---- the check itself, on rows of its own ----


def row(id, unit, p50, metric="time", date="2026-01-01"):
    common = {"bench": "bench_head", "machine": "one", "date": date, "metric": metric}
    return {"id": id, "unit": unit, "p50": p50, **common}


MADE_UP = {
    each["id"]: each
    for each in (
        row("ours_time", "s", "0.0214"),
        row("theirs_time", "s", "0.485"),
        row("older_time", "s", "0.107", date="2025-12-31"),
        row("ours_memory", "MB", "1230", metric="memory"),
        row("run_time", "s", "131"),
        row("rate", "rows/s", "3704", metric="rate"),
        row("gain", "x", "20.8", metric="speedup"),
        row("share", "%", "96.04", metric="accuracy"),
    )
}


def table(cells, comment):
    return f"| What | a | b |\n|---|---|---|\n| 512 x 32,000, 5 s | {cells} |\n\n{comment}\n"


@pytest.mark.parametrize(
    "cells, ids",
    [
        ("21.4 ms | 0.485 s", "ours_time, theirs_time"),
        ("0.02 s | 23x", "ours_time,\n  theirs_time"),  # 0.485 / 0.0214 = 22.66
        ("1.2 GB, 1,230 MB | ", "ours_memory"),
        ("3,704 | 3,704 rows/s", "rate"),
        ("21x | 96.0 %", "gain, share"),
        ("21.4 ms with torch 2.11.0 | in 8-bit form of `3 s`", "ours_time"),
    ],
)
def test_figures_of_rows_pass(cells, ids):
    assert faults(table(cells, f"<!-- results: {ids} -->"), MADE_UP) == []


@pytest.mark.parametrize(
    "cells, ids, fault",
    [
        ("21.3 ms | ", "ours_time", "21.3 ms is in none"),
        ("21.4 s | ", "ours_time", "21.4 s is in none"),
        ("22x | 21.4 ms", "ours_time, theirs_time", "22x is in none"),
        ("5.0x | 21.4 ms", "ours_time, older_time", "5.0x is in none"),  # of two days
        ("96.1 % | ", "share", "96.1 % is in none"),
        ("21.4 ms | ", "ours_time, rate", "no figure is taken from rate"),
        ("21.4 ms | ", "our_time", "has no row our_time"),
    ],
)
def test_other_figures_do_not(cells, ids, fault):
    assert fault in "\n".join(faults(table(cells, f"<!-- results: {ids} -->"), MADE_UP))


def test_figures_need_rows_or_a_reason():
    bare = table("21.4 ms | ", "")
    assert faults(bare, MADE_UP) == ["line 1: no rows are named for 21.4 ms"]
    assert faults(bare + "<!-- not measured: a setting -->", MADE_UP) == []
    assert faults("<!-- not measured: a setting -->\n\n" + bare, MADE_UP) == []
    words = "Some text.\n\nA step takes 21.4 ms\nand 1.2 GB, 23x less.\n"
    assert faults(words, MADE_UP) == ["line 3: no rows are named for 21.4 ms, 1.2 GB, 23x"]
    ids = "<!-- results: ours_time, theirs_time, ours_memory -->"
    assert faults(words + ids, MADE_UP) == []
    assert faults("The shape is 4096 x 4096, `5 s`, of 8-bit codes.\n", MADE_UP) == []
    assert faults("```sh\nsleep 5 s\n```\n", MADE_UP) == []
    assert faults(table("128 | 4,096", ""), MADE_UP) == []
    # Round numbers are figures where rows are named.
    about = "It takes about two minutes.\n"
    assert faults(about, MADE_UP) == []
    assert faults(about + "<!-- results: run_time -->", MADE_UP) == []
    assert faults(about + "<!-- results: ours_time -->", MADE_UP) != []
    # A reason excuses its neighbours, not the whole page.
    assert len(faults(bare + "<!-- not measured: why -->\n\ntext\n\n" + words, MADE_UP)) == 1
