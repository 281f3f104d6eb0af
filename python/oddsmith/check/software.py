"""Releases of Python and of the packages that a run stands on, without importing them."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from .findings import Problem

__all__ = ["PEERS", "nvidia_driver", "package_problems", "packages", "system"]

# What a user may have beside the packages that are needed.
PEERS = (
    "bitsandbytes",
    "flash-attn",
    "liger-kernel",
    "triton",
    "deepspeed",
    "trl",
    "tensorboard",
    "pillow",
)


def system() -> dict[str, str | None]:
    """Python and the operating system."""
    return {"Python": platform.python_version(), "system": platform.platform()}


def nvidia_driver() -> str | None:
    """The release of the driver of NVIDIA's GPUs, where the system tells."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    version = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return version[1] if version else None


def packages() -> dict[str, str | None]:
    """The releases of oddsmith, of what it needs, and of its peers; None where one is missing."""
    needed = [requirement.name for requirement in _needed()]
    names = dict.fromkeys(["oddsmith", *needed, "tokenizers", "numpy", *PEERS])
    return {name: _release_of(name) for name in names}


def package_problems(found: dict[str, str | None]) -> list[Problem]:
    """What is missing or too old."""
    problems = []
    for requirement in _needed():
        version = found.get(requirement.name)
        if version is None:
            what = f"{requirement.name} is missing"
        elif not requirement.specifier.contains(version, prereleases=True):
            what = f"{requirement.name} is {version}, and {requirement.specifier} is needed"
        else:
            continue
        problems.append(Problem(what, f'pip install "{requirement}"', fatal=True))
    return problems


def _needed() -> list[Requirement]:
    """Of oddsmith's own metadata, without its extras."""
    try:
        lines = metadata.requires("oddsmith") or []
    except metadata.PackageNotFoundError:
        return []
    found = map(Requirement, lines)
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _release_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
