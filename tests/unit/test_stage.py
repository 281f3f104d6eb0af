"""Outputs appear when they are complete, and what killed processes have left is removed."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import oddsmith
from oddsmith import stage
from oddsmith.stage import new_file, new_folder, publish, staged_file

OLD = time.time() - 3600


def age(path):
    os.utime(path, (OLD, OLD))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with staged_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and names(path.parent) == ["a.txt"]
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(error), staged_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(call, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    monkeypatch.setattr(stage.os, call, full)
    with pytest.raises(OSError, match="No space"), staged_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.txt"]


def test_a_disk_that_is_full_when_the_file_is_closed(tmp_path, monkeypatch):
    real = stage.new_file

    def full(folder):
        path, file = real(folder)
        file.close()
        return path, open("/dev/full", "wb")

    monkeypatch.setattr(stage, "new_file", full)
    with pytest.raises(OSError, match="No space"), staged_file(tmp_path / "a.txt") as file:
        file.write(b"new")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from oddsmith.stage import new_file, new_folder
folder = Path(sys.argv[1])
with new_folder(folder) as made:
    (made / "model.safetensors").write_bytes(b"half")
    path, file = new_file(folder)
    print(made.name, path.name, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


@pytest.mark.skipif(stage.fcntl is None, reason="no locks of files")
def test_what_a_killed_process_has_left_is_removed(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, "killed"], capture_output=True, text=True
    )
    left = process.stdout.split()
    assert names(tmp_path) == sorted(left) and len(left) == 2
    (tmp_path / "mine.txt").touch()
    with new_folder(tmp_path):
        assert set(left) <= set(names(tmp_path))  # young: their locks could be missing yet
    for name in left:
        age(tmp_path / name)
    with staged_file(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == ["a.txt", "mine.txt"]


@pytest.mark.skipif(stage.fcntl is None, reason="no locks of files")
def test_what_a_living_process_writes_stays(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path, "lives"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        written = process.stdout.readline().split()
        for name in written:
            age(tmp_path / name)
        with staged_file(tmp_path / "a.txt"):
            pass
        assert set(written) <= set(names(tmp_path))
        process.communicate()


@pytest.mark.skipif(stage.fcntl is None, reason="no locks of files")
def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def missing(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(stage.fcntl, "flock", missing)
    path, file = new_file(tmp_path)
    file.close()
    age(path)
    with new_folder(tmp_path):
        assert path.exists()


def test_links_are_not_followed(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").touch()
    link = tmp_path / "out" / f"{stage.PREFIX}link"
    link.parent.mkdir()
    link.symlink_to(target)
    os.utime(target, (OLD, OLD))
    with staged_file(tmp_path / "out" / "a.txt"):
        pass
    assert names(target) == ["kept"] and link.is_symlink()


def test_a_file_is_published_by_its_name(tmp_path):
    made = tmp_path / "made"
    made.write_bytes(b"new")
    publish(made, tmp_path / "a.txt")
    assert names(tmp_path) == ["a.txt"]


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_are_those_of_the_umask(tmp_path, umask):
    path, file = new_file(tmp_path)
    file.close()
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with new_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_umask_is_never_set():
    """It belongs to the process: another thread's files would get it meanwhile."""
    package = Path(oddsmith.__file__).parent
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(texts) > 50
    assert not [path for path, text in texts.items() if re.search(r"\bumask\(", text)]
