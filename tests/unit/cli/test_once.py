"""What all processes say is said by one of them."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from oddsmith.cli import once


@pytest.fixture
def fresh(monkeypatch):
    """Forgets what this process has said."""

    def forget():
        monkeypatch.setattr(once, "_claimed", {})

    forget()
    return forget


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return tmp_path


def test_the_first_says_it(fresh, folder, capsys):
    once.say("wrong")
    once.say("wrong")  # again: this process does
    fresh()
    once.say("wrong")  # another process
    once.say("of this one")
    assert capsys.readouterr().err == "wrong\nwrong\nof this one\n"


@pytest.mark.parametrize(("report", "size"), [("", "2"), ("/no/such/0/error.json", "1")])
def test_one_process_says_all(fresh, report, size, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", report)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
    assert once.shared_folder() is None
    once.say("wrong")
    fresh()
    once.say("wrong")
    assert capsys.readouterr().err == "wrong\nwrong\n"


def test_nothing_is_lost_if_the_folder_is_gone(fresh, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/no/such/0/error.json")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    once.say("wrong")
    assert capsys.readouterr().err == "wrong\n"


PROGRAM = """
import logging, sys, warnings
from oddsmith.cli import once
logging.basicConfig(level=logging.INFO)
once.quieten()
once.quieten()
logger = logging.getLogger("some.room")
for _ in range(2):
    logger.warning("the same of %s", "all")
    logger.info("a note")
logger.warning("of process %s alone", sys.argv[1])
warnings.warn("a Python warning of all")
"""


def test_warnings_of_the_log_and_of_python(folder):
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    shown = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, rank], env=environment, capture_output=True, text=True
        ).stderr
        for rank in "01"
    ]
    assert [text.count("the same of all") for text in shown] == [2, 0]
    assert [text.count("a note") for text in shown] == [2, 2]
    assert [text.count("a Python warning of all") for text in shown] == [1, 0]
    assert all(f"of process {rank} alone" in text for rank, text in zip("01", shown))


def test_one_process_has_no_filter(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    before, filters = warnings.showwarning, list(logging.lastResort.filters)
    once.quieten()
    assert warnings.showwarning is before and logging.lastResort.filters == filters
