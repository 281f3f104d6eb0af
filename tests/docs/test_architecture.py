"""docs/architecture.md names every file, and finds what it promises to find."""

import re

import pytest

from support.paths import ROOT

PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
PLACES = re.findall(r"^\| [^|]+ \| `([^`]+)` \| `([^`]+)` \|$", TEXT, re.MULTILINE)


def listed():
    """Paths in the tables of the rooms."""
    found = []
    for room, table in re.findall(r"^### `([^`]+)/`\n(.*?)(?=^### |\Z)", TEXT, re.S | re.M):
        for cell in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE):
            found += [f"{room}/{name}" for name in re.findall(r"`([^`]+)`", cell)]
    return found


def test_there_are_places():
    assert len(PLACES) >= 20


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_what_is_where(path, name):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"\b{re.escape(name)}\b", text), f"{path} has no {name}"


@pytest.mark.parametrize("path", listed())
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_every_file_is_listed():
    names = listed()
    assert len(names) == len(set(names))
    files = [
        *(ROOT / "python" / "oddsmith").rglob("*.py"),
        *(ROOT / "src").rglob("*.rs"),
        *(ROOT / "src").rglob("*.cpp"),
        *(ROOT / "kernels").iterdir(),
    ]
    paths = {str(path.relative_to(ROOT)) for path in files}
    # A room's own file says what the room is; Rust's tests lie beside what they test.
    own = {
        path for path in paths if re.search(r"/(__init__\.py|mod\.rs|tests\.rs|tests/.*)$", path)
    }
    assert paths - own - set(names) == set()


def test_paths_in_the_text_exist():
    folders = [ROOT, ROOT / "python" / "oddsmith", ROOT / "src" / "torch" / "head"]
    for name in re.findall(r"`([\w/]+\.(?:py|rs|cu|cuh|cpp))`", TEXT.partition("## The files")[0]):
        assert any((folder / name).exists() for folder in folders), name
