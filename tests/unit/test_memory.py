"""The memory of a machine and of a container."""

import pytest

from oddsmith import memory

MEMINFO = "MemTotal:  4000 kB\nMemFree: 1 kB\nMemAvailable:   3000 kB\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    def write(meminfo=None, limit=None, used=None):
        for name, text in (("meminfo", meminfo), ("max", limit), ("current", used)):
            if text is not None:
                (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "_GROUPS", ((tmp_path / "max", tmp_path / "current"),))

    return write


def test_without_a_container(files):
    files(MEMINFO, "max\n", "123\n")
    assert (memory.total(), memory.available()) == (4_096_000, 3_072_000)


def test_the_limit_of_a_container(files):
    files(MEMINFO, "1000000\n", "400000\n")
    assert (memory.total(), memory.available()) == (1_000_000, 600_000)


def test_a_container_that_uses_more_than_its_limit(files):
    files(MEMINFO, "1000000\n", "1400000\n")
    assert memory.available() == 0


def test_a_system_without_these_files(files):
    files()
    assert memory.total() is None
    assert memory.available() is None


def test_this_machine():
    total, available = memory.total(), memory.available()
    assert total is None or 0 < available <= total
