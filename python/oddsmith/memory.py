"""The memory that this process may use, in bytes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available", "total"]

_MEMINFO = Path("/proc/meminfo")
# A container's limit and what it uses: of version 2 of control groups, and of version 1.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def total() -> int | None:
    """The machine's memory or the container's limit, whichever is less; None where unknown."""
    return _least(_meminfo("MemTotal"), *(limit for limit, _ in _limits()))


def available() -> int | None:
    """What can still be allocated without swapping; None where unknown."""
    return _least(_meminfo("MemAvailable"), *(limit - used for limit, used in _limits()))


def _least(*sizes: int | None) -> int | None:
    known = [size for size in sizes if size is not None]
    return max(0, min(known)) if known else None


def _meminfo(name: str) -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    return None


def _limits() -> list[tuple[int, int]]:
    found = []
    for limit, used in _GROUPS:
        try:
            # "max" where there is none.
            found.append((int(limit.read_text()), int(used.read_text())))
        except (OSError, ValueError):
            continue
    return found
