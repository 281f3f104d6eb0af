"""Runs competing callables in turns and reports medians, ratios and memory."""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = [
    "bench",
    "case",
    "name",
    "p20_s",
    "p50_s",
    "p80_s",
    "extra_mb",
    "runs",
    "device",
    "threads",
    "versions",
]


def _status(key: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that resident memory rises above its level before the call (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return peak


def interleave(
    runs: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of each run, one repeat of all after another, so that drift hits all alike; in another
    order each time, for what a run leaves behind (memory to give back, caches) hits its successor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    draw = random.Random(0)
    for repeat in range(warm_up + repeats):
        for name, run in draw.sample(list(runs.items()), len(runs)):
            start = time.perf_counter()
            kept = run()
            elapsed = time.perf_counter() - start
            del kept
            if repeat >= warm_up:
                seconds[name].append(elapsed)
        print(f"\r  round {repeat + 1}/{warm_up + repeats}", end="", flush=True)
    print("\r" + " " * 30 + "\r", end="")
    return seconds


def quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def processor() -> str:
    """The machine's own name for its processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def versions(*packages: str) -> str:
    return " ".join(f"{p}={importlib.metadata.version(p)}" for p in packages)


def report(
    bench: str,
    case: str,
    seconds: dict[str, list[float]],
    extra: dict[str, int],
    baseline: str,
    threads: int,
    used: str,
) -> None:
    """Prints a table with ratios to `baseline` and appends the rows to results.csv."""
    base = statistics.median(seconds[baseline])
    print(f"{case}")
    print(f"  {'':24}{'median':>10}{'p20':>9}{'p80':>9}{'ours is':>10}{'extra MB':>10}")
    rows = []
    for name, values in seconds.items():
        p20, p50, p80 = (quantile(values, 0.2), statistics.median(values), quantile(values, 0.8))
        megabytes = extra.get(name, 0) / 1e6
        memory = f"{megabytes:10.0f}" if name in extra else " " * 10
        print(f"  {name:24}{p50:9.4f}s{p20:8.4f}s{p80:8.4f}s{p50 / base:9.2f}x{memory}")
        rows.append(
            [
                bench,
                case,
                name,
                f"{p20:.4f}",
                f"{p50:.4f}",
                f"{p80:.4f}",
                f"{megabytes:.1f}" if name in extra else "",
                len(values),
                processor(),
                threads,
                used,
            ]
        )
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerows(rows)
