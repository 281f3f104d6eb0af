"""Old checkpoints are whole or not there, also while they are removed."""

import json
import os
import signal
import subprocess
import sys

import pytest

from oddsmith.training.checkpoint_hooks import STAGE
from oddsmith.training.checkpoints import STATE_FILE, is_whole
from oddsmith.training.rotation import keep_best, rotate

# Kills itself when one file has been removed.
KILLED = """
import os, signal, sys
from pathlib import Path
from oddsmith.training import rotation

unlink, count = os.unlink, []

def second(*args, **kwargs):
    if count:
        os.kill(os.getpid(), signal.SIGKILL)
    count.append(unlink(*args, **kwargs))

os.unlink = second
folder = Path(sys.argv[1])
if sys.argv[2] == "rotate":
    rotation.rotate(folder, 1, None, folder / "_unfinished")
else:
    rotation.keep_best(folder, str(folder / "checkpoint-3"), folder / "_unfinished")
"""


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 3):
        made = tmp_path / f"checkpoint-{step}"
        (made / "part").mkdir(parents=True)
        (made / STATE_FILE).write_text(json.dumps({"global_step": step}))
        for name in ("model.safetensors", "optimizer.pt", "part/0"):
            (made / name).write_text("x")
        os.utime(made, (step, step))
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("way", ["rotate", "keep_best"])
def test_a_kill_in_the_middle_leaves_no_part_of_a_checkpoint(way, folder):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), way], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert names(folder) == [STAGE, "checkpoint-2", "checkpoint-3"]
    for name in ("checkpoint-2", "checkpoint-3"):
        assert is_whole(folder / name) and len(list((folder / name).iterdir())) == 4
    rotate(folder, 1, None, folder / STAGE)  # of the next run
    assert names(folder) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3]),
        (0, None, [1, 2, 3]),
        (3, None, [1, 2, 3]),
        (2, None, [2, 3]),
        (1, None, [3]),
        (2, 1, [1, 3]),
        (1, 1, [1, 3]),
        (1, 3, [3]),
    ],
)
def test_those_that_transformers_removes(limit, best, left, folder, tmp_path_factory):
    from shutil import copytree

    from transformers.trainer_utils import rotate_checkpoints

    other = tmp_path_factory.mktemp("other") / "out"
    copytree(folder, other)
    named = best and f"checkpoint-{best}"
    rotate(folder, limit, named and str(folder / named), folder / STAGE)
    rotate_checkpoints(str(other), limit, named and str(other / named), use_mtime=True)
    assert names(folder) == names(other) == [f"checkpoint-{step}" for step in left]


def test_only_the_best_one_is_kept(folder):
    keep_best(folder, str(folder / "checkpoint-1"), folder / STAGE)
    assert names(folder) == ["checkpoint-1"]


def test_one_that_cannot_be_renamed_is_not_whole_when_its_files_go(folder, monkeypatch):
    def refused(*args):
        raise OSError("a mount")

    monkeypatch.setattr("oddsmith.training.rotation.os.rename", refused)
    monkeypatch.setattr("oddsmith.training.rotation.shutil.rmtree", lambda *args, **kwargs: None)
    rotate(folder, 2, None, folder / STAGE)
    assert not is_whole(folder / "checkpoint-1") and is_whole(folder / "checkpoint-2")


def test_links_are_left(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("elsewhere") / "checkpoint-1"
    os.rename(folder / "checkpoint-1", target)
    (folder / "checkpoint-1").symlink_to(target)
    rotate(folder, 1, None, folder / STAGE)
    assert is_whole(target) and (folder / "checkpoint-1").is_symlink()
