"""What `python -m benches.gpu` measures with: time and memory on a device, a table, rows of results.csv."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..results import Recorder, processor, slug

PACKAGES = "oddsmith torch transformers trl bitsandbytes liger-kernel cut-cross-entropy".split()
# Columns of the table that rows of results.csv hold, with metric and unit. The others follow from the time.
RECORDED = {
    "tokens_s": ("rate", "tokens/s"),
    "of_peak": ("share_of_peak", "%"),
    "peak_gb": ("memory", "GB"),
    "extra_gb": ("extra_memory", "GB"),
}


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclass
class Bench:
    """The device, the deadline, and the rows measured so far."""

    device: torch.device
    deadline: float
    repeats: int
    recorder: Recorder
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
        """Prints a line if a peer fails on this GPU, driver or release, and goes on with the others."""
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

    def report(self, key: str, case: str, name: str, seconds: list[float], **columns) -> None:
        """A row of the table, and its rows in results.csv: DEVICE_KEY_NAME_time and so on."""
        row = {"case": case, "name": name, "p50_s": statistics.median(seconds), **columns}
        self.rows.append({column: value for column, value in row.items() if value is not None})
        id = f"{device_tag(self.device_name())}_{key}_{slug(name)}"
        self.recorder.add(f"{id}_time", case, name, "time", "s", seconds)
        for column, (metric, unit) in RECORDED.items():
            if columns.get(column) is not None:
                value = columns[column] * (100 if unit == "%" else 1)
                self.recorder.add(f"{id}_{metric}", case, name, metric, unit, [value])


def device_tag(name: str) -> str:
    """The first part of a row's id: `h100` for "NVIDIA H100 80GB HBM3"."""
    model = re.search(r"\b[A-Z]{1,4}\d+\w*\b", name)
    return slug(model[0] if model else name)


def machine(device: torch.device) -> str:
    if device.type != "cuda":
        return processor(torch.get_num_threads())
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB, CUDA {torch.version.cuda}"


def print_table(rows: list[dict]) -> None:
    """`ours is` is the time of a row over that of the first row of its case."""
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
            *[f"{row[key]:.0f}" if key in row else "" for key in ("tokens_s", "gb_s")],
            f"{row['tflop_s']:.1f}" if "tflop_s" in row else "",
            f"{row['of_peak']:.0%}" if "of_peak" in row else "",
            *[f"{row[key]:.2f}" if key in row else "" for key in ("peak_gb", "extra_gb")],
        ]
        print(f"  {row['name']:28}" + "".join(f"{number:>11}" for number in numbers))
