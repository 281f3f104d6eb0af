"""A run that SIGTERM stops under an engine that splits the model: a whole checkpoint, one line, and the
same end to the bit. The two processes run this file as a script.
"""

import io
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from oddsmith.training import stop_hooks
from oddsmith.training.checkpoints import is_whole
from oddsmith.training.stop_hooks import Stopped
from support.deepspeed_on_cpu import allow_cpus, end_deepspeed, zero
from support.engine_runs import FEATURES, make_trainer
from support.engines import ENGINES, Engine, under, whole_weights
from support.processes import end, report, reports, two_processes
from support.stopping import AskToStop
from support.trainer_runs import train_logs

STEPS = 6
ASKED_AFTER = 2
FSDP2 = {name: ENGINES[name] for name in ("FSDP2 by arguments", "FSDP2 by environment")}
ZERO: dict[str, Engine] = {f"ZeRO-{stage}": Engine(zero(stage)) for stage in (2, 3)}


def trainer_for(engine, models, out, **changed):
    options = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    options |= {"enable_jit_checkpoint": True, "disable_dropout": False, **changed}
    return make_trainer(engine, FEATURES["adamw_8bit"], models, out, **options)


def ended(trainer):
    """What a run has ended with: the same on both processes."""
    weights = whole_weights(trainer.model)
    return weights, [log["loss"] for log in train_logs(trainer)]


def stopped_and_resumed(engine, models, out, process):
    trainer = trainer_for(engine, models, out)
    trainer.add_callback(AskToStop(ASKED_AFTER, process))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            trainer.train()
    except Stopped as stopped:
        code, checkpoint = stopped.code, stopped.checkpoint
    else:
        raise AssertionError("the run was not stopped")
    step = trainer.state.global_step
    assert is_whole(checkpoint) and checkpoint.name == f"checkpoint-{step}"
    assert not (out / "_unfinished").exists()
    lines = [line for line in said.getvalue().splitlines() if "Stopped by SIGTERM" in line]
    again = trainer_for(engine, models, out)
    again.train(resume_from_checkpoint=True)
    weights, losses = ended(again)
    assert losses[:step] == [log["loss"] for log in train_logs(trainer)]
    return [step, code, lines], weights, losses


def warned(models, out):
    """What is said of a run that cannot be resumed."""
    engine = ENGINES["FSDP2 by DistributedConfig"]
    with under(engine), patch.object(stop_hooks.logger, "warning") as warning:
        trainer = trainer_for(engine, models, out)
    return [trainer._stop is None, *(call.args[0] for call in warning.call_args_list)]


def main(models, folder, *names):
    found = {}
    if names[0] in ZERO:
        allow_cpus()
    for name in names:
        engine, out = {**FSDP2, **ZERO}[name], Path(folder) / name
        with under(engine):
            # The process that writes no checkpoint is asked.
            found[name], weights, losses = stopped_and_resumed(
                engine, Path(models), out / "stopped", process=1
            )
            end_deepspeed()
            through = trainer_for(engine, Path(models), out / "through")
            through.train()
            expected, others = ended(through)
            end_deepspeed()
        assert losses == others, name
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
    if names[0] in FSDP2:
        found["warned"] = warned(Path(models), Path(folder) / "warned")
    report(folder, found)


def check(names, models, folder):
    two_processes(__file__, models, folder, *names, timeout=600)
    for rank, each in enumerate(reports(folder)):
        for name in names:
            step, code, lines = each[name]
            assert (step, code) == (ASKED_AFTER + 2, 143), name
            saved = folder / name / "stopped" / f"checkpoint-{step}"
            expected = (
                f"Stopped by SIGTERM after step {step} of {STEPS}; saved {saved}. To go on: "
                "trainer.train(resume_from_checkpoint=True)"
            )
            assert lines == ([] if rank else [expected]), name
    return reports(folder)


def test_fsdp2(engine_models, tmp_path):
    for each in check([*FSDP2], engine_models, tmp_path):
        none_listens, said = each["warned"]
        assert none_listens and said.startswith("SIGTERM saves no checkpoint: transformers cannot")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(engine_models, tmp_path):
    check([*ZERO], engine_models, tmp_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
