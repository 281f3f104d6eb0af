"""Runs that are killed at any moment and resumed: they end as if nothing had happened, bit for bit."""

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from oddsmith.stage import PREFIX
from oddsmith.training.checkpoints import checkpoints, is_whole

from .counts import Counts
from .runs import combinations, forked, train

ALL = 1000
# What a run may leave in its output folder.
_EXPECTED = {
    "README.md", "chat_template.jinja", "config.json", "digest", "generation_config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin",
    "special_tokens_map.json", "trainer_state.json", "tokenizer.model",
}  # fmt: skip
_PART = "kills"
# Kills of one run, after which it may go on to its end.
_MOST = 10


def soak(counts: Counts, share: float) -> None:
    """Kills runs of every combination until each has its part of all kills."""
    every = list(combinations())
    wanted = max(1, round(ALL * share))
    rounds = -(-wanted // len(every))
    for number in range(rounds):
        for place, (optimizer, path) in enumerate(every):
            name = f"{optimizer}, {path}"
            goal = number + 1 if number * len(every) + place < wanted else number
            while counts.get(_PART, name)["done"] < goal:
                _cycles(counts, optimizer, path)
                counts.say(_PART, name, goal)
                if counts.get(_PART, name)["faults"]:
                    break
        done = sum(entry["done"] for entry in counts.found.get(_PART, {}).values())
        print(f"kills: {done:,} of {wanted:,}", flush=True)


def _cycles(counts: Counts, optimizer: str, path: str) -> None:
    """One run to its end, killed some times on its way."""
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        folder, scratch, log = Path(place) / "out", Path(place) / "tmp", Path(place) / "log"
        scratch.mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        try:
            kills, seconds, faults = _run(folder, log, optimizer, path)
            if not faults:
                left = [each.name for each in scratch.iterdir()]
                faults = [f"left in the folder for temporary files: {left}"] if left else []
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"]
        counts.add(_PART, f"{optimizer}, {path}", kills, seconds, faults)


def _run(folder: Path, log: Path, optimizer: str, path: str) -> tuple[int, float, list[str]]:
    begun = time.monotonic()
    code, whole = forked(lambda: train(folder, optimizer, path), log)
    if code:
        return 0, whole, [f"a run without kills ended with {code}: {_last(log)}"]
    expected = (folder / "digest").read_text()
    shutil.rmtree(folder)
    kills = 0
    while True:
        # Every moment of a run, the last save too.
        after = random.uniform(0.05, 0.8) * whole if kills < _MOST else None
        code, _ = forked(lambda: train(folder, optimizer, path), log, after)
        if code == -signal.SIGKILL and after is not None:
            kills += 1
            if fault := _look(folder):
                return kills, time.monotonic() - begun, [fault]
            continue
        faults = []
        if code:
            faults.append(f"after {kills} kills a run ended with {code}: {_last(log)}")
        elif (folder / "digest").read_text() != expected:
            faults.append(f"after {kills} kills a run ended otherwise than without")
        else:
            names = {
                each.name for each in folder.iterdir() if not each.name.startswith("checkpoint-")
            }
            # Stages of killed processes stay for a minute.
            names = {name for name in names if not name.startswith(PREFIX)}
            if names - _EXPECTED:
                faults.append(f"left in the output folder: {sorted(names - _EXPECTED)}")
        return kills, time.monotonic() - begun, faults


def _look(folder: Path) -> str | None:
    """What is wrong in the output folder of a process that was killed."""
    if not folder.is_dir():
        return None
    # An older one may be on its way out.
    for checkpoint in checkpoints(folder)[:1]:
        if not is_whole(checkpoint):
            return f"{checkpoint.name} is the newest and not whole"
    return None


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:])[-600:]
