"""A long run in constant memory, with a constant number of open files and threads."""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .counts import Counts
from .runs import forked, trainer_for

ALL = 20_000
_PART = "steps"
_EVERY = 100
# Bytes by which a process may grow from a fifth of the steps, after the first checkpoint, to the end: its log, and what an allocator keeps.
_GROWTH = 24 << 20


class _Watch(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[list[int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % _EVERY == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
            files, threads = (len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task"))
            self.rows.append([state.global_step, resident, files, threads])
            self.path.write_text(json.dumps(self.rows))


def soak(counts: Counts, share: float) -> None:
    """Trains, once."""
    steps = max(10 * _EVERY, round(ALL * share))
    for optimizer, path in (
        ("adamw_8bit", "map, packed"),
        ("paged_adamw_8bit", "streamed, padded"),
    ):
        name = f"{optimizer}, {path}"
        if counts.get(_PART, name)["done"] >= steps:
            continue
        with tempfile.TemporaryDirectory(prefix="soak-") as place:
            found, log = Path(place) / "watch", Path(place) / "log"
            code, seconds = forked(
                functools.partial(_train, Path(place), optimizer, path, steps), log
            )
            rows = json.loads(found.read_text()) if found.exists() else []
            faults = _faults(code, rows, log)
        entry = counts.get(_PART, name)
        entry["done"] = 0  # a run that was interrupted counts for nothing
        if rows:
            entry["first"], entry["last"] = rows[len(rows) // 5], rows[-1]
        counts.add(_PART, name, steps if not code else 0, seconds, faults)
        counts.say(_PART, name, steps)


def _train(place: Path, optimizer: str, path: str, steps: int) -> None:
    options = {
        "max_steps": steps,
        "save_steps": max(1, steps // 10),
        "logging_steps": max(1, steps // 100),
    }
    trainer = trainer_for(place / "out", optimizer, path, **options)
    trainer.add_callback(_Watch(place / "watch"))
    trainer.train()


def _faults(code: int, rows: list[list[int]], log: Path) -> list[str]:
    if code or not rows:
        return [f"the run ended with {code}: {log.read_text(errors='replace')[-600:]}"]
    (_, before, *first), (_, after, *last) = rows[len(rows) // 5], rows[-1]
    faults = []
    if after - before > _GROWTH:
        faults.append(f"memory grew by {(after - before) >> 20} MB")
    if first != last:
        faults.append(f"open files and threads were {first}, and are {last}")
    return faults
