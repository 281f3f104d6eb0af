"""Temporary files and folders with the mode that new ones have."""

import os
import re
from pathlib import Path

import pytest

import oddsmith
from oddsmith.temporary import new_file, new_folder


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_are_those_of_the_umask(tmp_path, umask):
    path, file = new_file(tmp_path, ".pairs.")
    with file:
        file.write(b"it")
    folder = new_folder(tmp_path, ".model-")
    assert path.read_bytes() == b"it" and path.name.startswith(".pairs.")
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_names_differ(tmp_path):
    files = [new_file(tmp_path, "x") for _ in range(20)]
    assert len({path for path, _ in files}) == 20
    for _, file in files:
        file.close()


def test_the_umask_is_never_set():
    """It belongs to the process: another thread's files would get it meanwhile."""
    package = Path(oddsmith.__file__).parent
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(texts) > 50
    assert not [path for path, text in texts.items() if re.search(r"\bumask\(", text)]
