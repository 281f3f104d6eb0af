"""The rows of results.csv: what was measured, where, with which versions, and how the runs spread.

A row is known by its id, which README.md and docs/ name beside their figures. A new measurement
replaces the row of its id; the row before it is in the history of the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

FIELDS = (
    "id date bench case implementation metric unit p20 p50 p80 runs machine versions commit"
).split()
RESULTS = Path(__file__).with_name("results.csv")
ID = re.compile(r"[a-z0-9_.-]+")


def installed(*packages: str) -> list[str]:
    """Those of the packages that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.append(name)
    return found


def versions(packages: Iterable[str]) -> str:
    used = [f"{name}={importlib.metadata.version(name)}" for name in packages]
    return " ".join([f"python={platform.python_version()}", *used])


def processor(threads: int) -> str:
    """Name, family and model of the processor, its vector instructions, threads and memory."""
    import torch

    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = f"{fields.get('model name', platform.processor())}"
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    level = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {level}, {threads} threads, {memory:.0f} GB"


def commit() -> str:
    """The revision that is measured, with a `+` if files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(RESULTS.parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return ""
    # The rows themselves are no difference.
    others = ["--", ":/", ":(top,exclude)benches/results.csv"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", *others], capture_output=True)
    return found.stdout.strip() + ("+" if changed.returncode else "")


def quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def slug(text: str) -> str:
    """A text as part of an id: `torch AdamW, fused` is `torch_adamw_fused`."""
    return re.sub(r"[^a-z0-9.-]+", "_", text.lower()).strip("_")


class Recorder:
    """Adds the rows of one benchmark to a file, or to none.

    Args:
        bench (`str`): Name of the benchmark's file, without `.py`.
        packages: Whose versions a row names.
        machine (`str`): What it runs on.
        path (`Path`, *optional*): The file; without one rows are dropped.
    """

    def __init__(self, bench: str, packages: Iterable[str], machine: str, path: Path | None):
        self.common = {
            "date": datetime.date.today().isoformat(),
            "bench": bench,
            "machine": machine,
            "versions": versions(packages),
            "commit": commit(),
        }
        self.path = path

    def add(
        self, id: str, case: str, implementation: str, metric: str, unit: str, values: list[float]
    ) -> None:
        """One row of the values of all runs; a single value has no spread."""
        if self.path is None:
            return
        if not ID.fullmatch(id):
            raise ValueError(f"id is {id!r}; must be lower case letters, digits and _ . -")
        row = {"id": id, "case": case, "implementation": implementation, "metric": metric}
        row |= {"unit": unit, "p50": f"{statistics.median(values):.6g}", "runs": str(len(values))}
        if len(values) > 1:
            row |= {"p20": f"{quantile(values, 0.2):.6g}", "p80": f"{quantile(values, 0.8):.6g}"}
        write_row(self.path, dict.fromkeys(FIELDS, "") | self.common | row)


def read_rows(path: Path = RESULTS) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_row(path: Path, row: dict[str, str]) -> None:
    """Puts a row in the place of the one with its id, or at the end."""
    rows = {old["id"]: old for old in read_rows(path)} if path.exists() else {}
    rows[row["id"]] = row
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def record_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE",
        help="put the rows into this file (benches/results.csv if none is named)",
    )
