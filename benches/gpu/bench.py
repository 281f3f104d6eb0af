"""What `python -m benches.gpu` measures with: time and memory on a device, a table, a CSV file."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

FIELDS = (
    "case name p20_s p50_s p80_s runs tokens_s gb_s tflop_s of_peak peak_gb extra_gb "
    "device versions"
).split()


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclass
class Bench:
    """Where it runs, how long it may, and what it has found."""

    device: torch.device
    deadline: float
    repeats: int
    rows: list[dict] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def out_of_time(self) -> bool:
        return time.perf_counter() > self.deadline

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "CPU"

    @contextlib.contextmanager
    def survives(self, case: str, name: str) -> Iterator[None]:
        """A peer that this card, driver or release does not suit leaves a line, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.failed.append(f"{case}, {name}")
            print(f"  {name}: {type(error).__name__}: {str(error).strip()[:500]}", flush=True)
            if self.cuda:
                torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        self.sync()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.sync()
        return (time.perf_counter() - start) / calls

    def extra_memory(self, run: Callable[[], object]) -> float | None:
        """Bytes above what is allocated before, results included."""
        if not self.cuda:
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.sync()
        return torch.cuda.max_memory_allocated() - before

    def interleave(self, runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each run, in turns and in another order each time. One call is 5 ms or more."""
        calls = {name: max(1, int(5e-3 / self.seconds(run, 3))) for name, run in runs.items()}
        found: dict[str, list[float]] = {name: [] for name in runs}
        draw = random.Random(0)
        for _ in range(self.repeats):
            for name, run in draw.sample(list(runs.items()), len(runs)):
                found[name].append(self.seconds(run, calls[name]))
        return found

    def report(self, case: str, name: str, seconds: list[float], **columns) -> None:
        ordered = sorted(seconds)
        p20, p80 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.8))
        row = dict.fromkeys(FIELDS, "")
        row |= {"case": case, "name": name, "p20_s": p20, "p50_s": statistics.median(seconds)}
        row |= {"p80_s": p80, "runs": len(seconds), "device": self.device_name()}
        self.rows.append(row | {key: value for key, value in columns.items() if value is not None})


def print_table(rows: list[dict]) -> None:
    """`ours is` says how often the first row of a case fits into the time of the others."""
    titles = ["median", "ours is", "tokens/s", "GB/s", "TFLOP/s", "of peak", "peak GB", "extra GB"]
    print(f"{'':30}" + "".join(f"{title:>11}" for title in titles))
    first: dict[str, float] = {}
    for row in rows:
        if row["case"] not in first:
            print(row["case"])
        base = first.setdefault(row["case"], row["p50_s"])
        numbers = [
            f"{row['p50_s'] * 1e3:.3f} ms" if row["p50_s"] < 0.1 else f"{row['p50_s']:.2f} s",
            f"{row['p50_s'] / base:.2f}x",
            *[f"{row[key]:.0f}" if row[key] != "" else "" for key in ("tokens_s", "gb_s")],
            f"{row['tflop_s']:.1f}" if row["tflop_s"] != "" else "",
            f"{row['of_peak']:.0%}" if row["of_peak"] != "" else "",
            *[f"{row[key]:.2f}" if row[key] != "" else "" for key in ("peak_gb", "extra_gb")],
        ]
        print(f"  {row['name']:28}" + "".join(f"{number:>11}" for number in numbers))


def write_csv(path: Path, rows: list[dict]) -> None:
    packages = "torch transformers oddsmith trl bitsandbytes liger-kernel cut-cross-entropy".split()
    used = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            used.append(f"{package}={importlib.metadata.version(package)}")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for row in rows:
            digits = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(digits | {"versions": " ".join(used)})
