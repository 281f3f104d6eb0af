"""docs/compatibility.md: every row is a cell of the matrix, and what pyproject.toml allows has been tested."""

import re
import subprocess
import sys

import pytest

from oddsmith import torch_version
from support import matrix

TEXT = matrix.PAGE.read_text(encoding="utf-8")
HEAD, *LINES = re.search(r"^\| torch \| Python \|.*\n(?:\|.*\n)+", TEXT, re.M)[0].splitlines()
ROWS = [dict(zip(matrix.COLUMNS, line.strip("| ").split(" | "), strict=True)) for line in LINES[1:]]

ran = pytest.mark.skipif(not ROWS, reason="`make matrix` has written no table yet")


def release(version, parts=2):
    return ".".join(version.split("+")[0].split(".")[:parts])


def is_of(row, cell):
    """Whether a row has the versions that its cell names."""
    bounds = matrix.oldest()
    lowest = all(row[name].startswith(bound) for name, bound in bounds.items())
    return (
        (release(row["torch"]), release(row["Python"])) == (cell.torch, cell.python)
        and row["numpy"].startswith(f"{cell.numpy}.")
        and lowest == (cell.end == "oldest")
    )


def test_the_table_is_that_of_the_script():
    assert matrix.table([]).splitlines()[0] == HEAD
    assert "\n".join([HEAD, *LINES]) + "\n" == matrix.table(ROWS)


@ran
def test_every_cell_has_a_row():
    missing = [cell for cell in matrix.CELLS if not any(is_of(row, cell) for row in ROWS)]
    # Rows are written where there is such a Python.
    assert {cell.python for cell in missing} <= {"3.14"}
    assert len(ROWS) == len(matrix.CELLS) - len(missing)


@ran
def test_everything_passed():
    for row in ROWS:
        assert int(row["failed"]) == 0 and int(row["passed"]) > 1000, row


@ran
def test_both_ends_are_tested():
    tested = {release(row["torch"]) for row in ROWS}
    assert {
        "{}.{}".format(*torch_version.OLDEST),
        "{}.{}".format(*torch_version.NEWEST_TESTED),
    } <= tested
    assert {release(row["numpy"], 1) for row in ROWS} == {"1", "2"}
    bounds = matrix.oldest()
    assert set(bounds) == set(matrix.LIBRARIES)
    for name, bound in bounds.items():
        assert any(release(row[name]) == bound for row in ROWS), name
        assert f"| {name} | {bound} or newer |" in TEXT


@pytest.mark.parametrize("name", ["torch", *matrix.LIBRARIES])
def test_nothing_has_an_upper_bound(name):
    tomllib = pytest.importorskip("tomllib", reason="Python has it from 3.11 on")
    text = (matrix.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    (needed,) = [each for each in project["dependencies"] if re.match(rf"{name}\W", each)]
    assert re.fullmatch(rf"{name}>=[\d.]+", needed)
    assert "<" not in project["requires-python"]


def test_the_table_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    before, after = TEXT.split("\n".join([HEAD, *LINES]) + "\n")
    page.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(matrix, "PAGE", page)
    row = dict.fromkeys(matrix.COLUMNS, r"\1")
    matrix.write([row, row])
    assert page.read_text(encoding="utf-8") == before + matrix.table([row, row]) + after


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No Python but this one, and none to be had."""

    def refuse(*arguments, **changed):
        raise subprocess.CalledProcessError(1, "uv")

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(matrix, "CACHE", tmp_path)
    monkeypatch.setattr(matrix, "uv", refuse)
    return tmp_path


def test_the_newest_torch_is_tested_without_another_python(nowhere):
    assert matrix.newest().python == matrix.THIS
    assert str(matrix.interpreter(matrix.THIS)) == sys.executable


def test_another_python_is_taken_if_it_starts(nowhere):
    other = "3.12" if matrix.THIS == "3.13" else "3.13"
    for folder, code in (("stand-in", 127), ("real", 0)):
        path = nowhere / "versions" / folder / "bin" / f"python{other}"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\nexit {code}\n")
        path.chmod(0o755)
    assert matrix.interpreter(other) == nowhere / "versions" / "real" / "bin" / f"python{other}"
    assert matrix.newest().python == other
