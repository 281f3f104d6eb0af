"""Folders that cannot be written, are full, or are open to others."""

import pytest

from oddsmith.check import folders, verdicts
from oddsmith.check.findings import Folder

ROOM = 1 << 40


def test_this_machine():
    found = {folder.what: folder for folder in folders.folders()}
    assert list(found) == ["kernels", "hub", "temporary", "current"]
    assert found["temporary"].writable
    assert found["current"].free > 0


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({"ODDSMITH_CACHE_DIR": "/a"}, "/a"),
        ({"ODDSMITH_CACHE_DIR": "", "XDG_CACHE_HOME": "/b"}, "/b/oddsmith/kernels"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/oddsmith/kernels"),
    ],
)
def test_the_folder_of_kernels(monkeypatch, variables, path):
    monkeypatch.delenv("ODDSMITH_CACHE_DIR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(verdicts.kernel_folder()) == path


def test_a_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("ODDSMITH_CACHE_DIR", str(tmp_path / "a" / "b"))
    kernels = folders.folders()[0]
    assert kernels.path == str(tmp_path / "a" / "b")
    assert kernels.writable and kernels.private and kernels.free > 0
    assert not (tmp_path / "a").exists()


def test_a_folder_that_others_can_write_to(tmp_path, monkeypatch):
    monkeypatch.setenv("ODDSMITH_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    kernels = folders.folders()[0]
    assert not kernels.private
    (problem,) = folders.folder_problems([Folder("kernels", str(tmp_path), ROOM, True, False)])
    assert problem.what.startswith(
        f"{tmp_path} can be changed by others: kernels are not kept there"
    )
    assert problem.remedy == f"chmod go-w {tmp_path}"


def test_a_link_to_the_folder_of_kernels(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "kernels")
    monkeypatch.setenv("ODDSMITH_CACHE_DIR", str(link))
    kernels = folders.folders()[0]
    assert not kernels.private
    (problem,) = folders.folder_problems([Folder("kernels", str(link), ROOM, True, False)])
    assert "is a link" in problem.what and "ODDSMITH_CACHE_DIR" in problem.remedy


@pytest.mark.parametrize(
    ("folder", "what", "remedy"),
    [
        (Folder("hub", "/h", ROOM, False, True), "cannot be written to", "HF_HOME"),
        (Folder("temporary", "/t", 1 << 30, True, False), "has 1.0 GB of free space", "TMPDIR"),
    ],
)
def test_problems(folder, what, remedy):
    (problem,) = folders.folder_problems([folder])
    assert what in problem.what
    assert remedy in problem.remedy
    assert not problem.fatal
    assert not folders.folder_problems([Folder("temporary", "/t", ROOM, True, False)])
