"""Runs competing callables in turns and reports medians, ratios and memory."""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from results import Recorder, installed, processor, quantile, record_flag, slug


def flags(doc: str, repeats: int) -> argparse.ArgumentParser:
    """What every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script out")
    record_flag(parser)
    return parser


def status(key: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that resident memory rises above its level before the call (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    kept = run()
    peak = status("VmHWM") - before
    del kept
    return peak


def interleave(
    runs: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of each run. Each round runs all of them once, so that drift affects all equally, and in
    another order, because what a run leaves behind (freed memory, caches) affects its successor.
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


def show(
    case: str, seconds: dict[str, list[float]], baseline: str, memory: dict[str, int] | None = None
) -> None:
    """Prints a table with ratios to `baseline`."""
    memory = memory or {}
    base = max(statistics.median(seconds[baseline]), 1e-9)  # some clocks have a digit only
    print(f"{case}")
    print(f"  {'':24}{'median':>10}{'p20':>9}{'p80':>9}{'ours is':>10}{'MB':>10}")
    for name, values in seconds.items():
        p20, p50, p80 = (quantile(values, 0.2), statistics.median(values), quantile(values, 0.8))
        megabytes = f"{memory[name] / 1e6:10.0f}" if name in memory else " " * 10
        print(f"  {name:24}{p50:9.4f}s{p20:8.4f}s{p80:8.4f}s{p50 / base:9.2f}x{megabytes}")


class Report:
    """Tables on the screen, and their rows in results.csv where `--record` asks for them.

    Args:
        bench (`str`): Name of the benchmark's file, without `.py`.
        args: What [`flags`] made.
        packages: Whose versions are noted, as far as they are installed.
    """

    def __init__(self, bench: str, args: argparse.Namespace, packages: tuple[str, ...]):
        used = installed("oddsmith", "torch", *packages)
        self.recorder = Recorder(bench, used, processor(args.threads), args.record)
        self.add = self.recorder.add

    def case(
        self,
        key: str,
        case: str,
        seconds: dict[str, list[float]],
        baseline: str,
        memory: dict[str, int] | None = None,
    ) -> None:
        """A table; its rows are `KEY_NAME_time` and, for those in `memory`, `KEY_NAME_memory`."""
        show(case, seconds, baseline, memory)
        for name, values in seconds.items():
            self.add(f"{key}_{slug(name)}_time", case, name, "time", "s", values)
        for name, count in (memory or {}).items():
            self.add(f"{key}_{slug(name)}_memory", case, name, "memory", "MB", [count / 1e6])
