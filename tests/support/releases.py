"""Releases of the libraries that results are compared with."""

from importlib.metadata import version


def release(name: str) -> tuple[int, int]:
    """Of an installed distribution, such as `(1, 16)`."""
    major, minor = version(name).split(".")[:2]
    return int(major), int(minor)
