"""A process that is killed in mid-step: the other one ends, and a resumed run ends as if nothing had
happened.

Run as a script this file is what starts the processes: it imports everything once and forks two for
each run.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from support.engine_runs import FEATURES, make_trainer, save_models
from support.engines import ENGINES, under, whole_weights
from support.forked import fork, import_all
from support.processes import ended

# Seconds that a collective waits for a process that says nothing.
TIMEOUT = 60


class Kill(TrainerCallback):
    """Kills one of the processes after the backward pass of a step."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def train(engine: str, models: Path, out: Path, steps: int, kill: Kill | None) -> None:
    """What each process runs; it goes on from the last checkpoint, if there is one."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    resume = get_last_checkpoint(str(out)) if out.is_dir() else None
    dist.barrier()  # both have looked
    options = {"max_steps": steps, "save_steps": 1, "save_total_limit": 2}
    with under(ENGINES[engine]):
        trainer = make_trainer(ENGINES[engine], FEATURES["full"], models, out, **options)
        if kill is not None:
            trainer.add_callback(kill)
        trainer.train(resume_from_checkpoint=resume)
        weights = whole_weights(trainer.model)
    if dist.get_rank() == 0:
        torch.save(weights, out / "weights.pt")
    dist.barrier()


def forked(*arguments: Any) -> tuple[list[int], float]:
    """How two processes end that run [`train`], and the seconds between their ends."""
    return fork(lambda: train(*arguments), patience=TIMEOUT + 30)


def main(models: str, folder: str, cycles: str, *engines: str) -> None:
    """Each engine: a run without a kill, and one that is killed in every second step."""
    import_all()
    steps = 2 * int(cycles) + 1
    for engine in engines:
        place = Path(folder) / engine
        through, killed = place / "through", place / "killed"
        report: dict[str, Any] = {"through": forked(engine, Path(models), through, steps, None)}
        report["killed"] = [
            forked(engine, Path(models), killed, steps, Kill(step, rank=step // 2 % 2))
            for step in range(2, steps, 2)
        ]
        report["end"] = forked(engine, Path(models), killed, steps, None)
        place.joinpath("report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("engine", ["DDP", "FSDP2 by arguments", "FSDP2 by environment"])
@pytest.mark.parametrize("cycles", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_and_resume(engine, cycles, tmp_path):
    save_models(tmp_path / "models")
    limit = 600 + 60 * cycles  # what a busy machine needs
    words = [__file__, tmp_path / "models", tmp_path, str(cycles), engine]
    code, errors = ended(words, limit)
    assert code == 0, errors[-4000:]
    place = tmp_path / engine
    report = json.loads((place / "report.json").read_text())
    assert report["through"][0] == report["end"][0] == [0, 0], errors[-4000:]
    assert len(report["killed"]) == cycles
    for ends, seconds in report["killed"]:
        assert sorted(ends) == [-signal.SIGKILL, 1], errors[-4000:]
        assert seconds < TIMEOUT + 30
    through, killed = (torch.load(place / run / "weights.pt") for run in ("through", "killed"))
    assert all(torch.equal(weight, killed[name]) for name, weight in through.items())


if __name__ == "__main__":
    main(*sys.argv[1:])
