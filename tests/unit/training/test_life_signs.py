"""Signs of life of a process. A lock does not hold against its own process, so another one gives them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from oddsmith.training import life_signs
from oddsmith.training.life_signs import Beat, Watch

SCRIPT = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("life_signs", sys.argv[1])
life_signs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(life_signs)
life_signs._BEAT = 0.05
if sys.argv[3] == "without locks":
    life_signs.fcntl = None
with life_signs.Beat(sys.argv[2]):
    if sys.argv[3] == "forks" and os.fork() == 0:
        time.sleep(60)
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def start(tmp_path):
    running = []

    def process(way="locks"):
        words = [sys.executable, "-c", SCRIPT, life_signs.__file__, tmp_path / "maker", way]
        run = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        running.append(run)
        assert run.stdout.readline() == "ready\n"
        return run

    yield process
    for run in running:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def heard(watch, limit=20.0):
    """What says that the process is dead."""
    until = time.monotonic() + limit
    while (said := watch.silence()) is None and time.monotonic() < until:
        time.sleep(0.02)
    return said


@pytest.mark.parametrize("way", ["locks", "forks"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_killed(way, number, start, tmp_path):
    run, watch = start(way), Watch(tmp_path / "maker")
    assert watch.silence() is None and watch.has_seen
    assert watch.process == str(run.pid)
    run.send_signal(number)
    assert heard(watch) == "ended"  # though a process that it has forked still runs


def test_a_process_that_has_done_its_work(start, tmp_path):
    run, watch = start(), Watch(tmp_path / "maker")
    assert watch.silence() is None
    run.communicate("go on\n")
    assert heard(watch) == "ended"


def test_a_folder_that_the_process_has_removed(tmp_path):
    watch = Watch(tmp_path / "maker")
    (tmp_path / "maker").write_bytes(b"7")
    assert watch.silence() is None
    (tmp_path / "maker").unlink()
    assert watch.silence() == "ended"


def test_a_file_system_without_locks(start, tmp_path, monkeypatch):
    monkeypatch.setattr(life_signs, "fcntl", None)
    monkeypatch.setattr(life_signs, "SILENT", 2.0)
    run, watch = start("without locks"), Watch(tmp_path / "maker")
    began = time.monotonic()
    while time.monotonic() < began + 3:  # longer than one may be silent
        assert watch.silence() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGSTOP)
    assert heard(watch) == "gave no sign of life for 2 s"


def test_a_stopped_process_keeps_its_lock(start, tmp_path, monkeypatch):
    monkeypatch.setattr(life_signs, "SILENT", 1.0)
    run, watch = start(), Watch(tmp_path / "maker")
    assert watch.silence() is None
    run.send_signal(signal.SIGSTOP)
    assert heard(watch) == "gave no sign of life for 1 s"


def test_a_file_that_is_never_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(life_signs, "START", 0.2)
    watch = Watch(tmp_path / "elsewhere" / "maker")
    assert heard(watch) == "has given no sign of life within 0 s"
    assert not watch.has_seen


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(OSError):
        Beat(Path(tmp_path / "none" / "maker"))
