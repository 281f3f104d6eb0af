"""A run that SIGTERM stops goes on where it was, bit for bit; with one process and with two, which
run this file as a script."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import Trainer

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training.checkpoints import is_whole
from oddsmith.training.stop_hooks import Stopped
from support.processes import end, report, reports, two_processes
from support.stopping import AskToStop
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs, train_logs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

STEPS = 7
ASKED_AFTER = 3


def trainer_for(folder, callbacks=(), **changed):
    tokenizer = make_tokenizer()
    model = make_model("qwen3_tied", tokenizer)
    config = {
        "max_steps": STEPS,
        "enable_jit_checkpoint": True,
        # Would remove all but one at the end of training.
        "save_total_limit": 1,
        "save_strategy": "no",
        "disable_dropout": False,
        "max_tokens_per_batch": 150,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    return ORPOTrainer(
        model=model,
        args=ORPOConfig(**arguments(folder, **{**config, **changed})),
        train_dataset=pairs(23),
        eval_dataset=pairs(3, seed=9),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def digest(trainer):
    sums = hashlib.sha256()
    for parameter in trainer.model.parameters():
        sums.update(parameter.detach().numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        sums.update(state["exp_avg"].numpy().tobytes())
    return sums.hexdigest()


def losses(trainer):
    return [entry["loss"] for entry in train_logs(trainer)]


def stopped_and_resumed(folder, process, **changed):
    """The step of the stop, its exit code, and what the resumed run ends with."""
    trainer = trainer_for(folder, [AskToStop(ASKED_AFTER, process)], **changed)
    before = signal.getsignal(signal.SIGTERM)
    try:
        trainer.train()
    except Stopped as stopped:
        code, checkpoint = stopped.code, stopped.checkpoint
    else:
        raise AssertionError("the run was not stopped")
    assert signal.getsignal(signal.SIGTERM) is before
    assert is_whole(checkpoint)
    step = trainer.state.global_step
    assert checkpoint.name == f"checkpoint-{step}"
    again = trainer_for(folder, **changed)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == [*losses(trainer), *losses(again)[step:]]
    return step, code, digest(again), losses(again)


def whole(folder):
    trainer = trainer_for(folder)
    trainer.train()
    return digest(trainer), losses(trainer)


def test_one_process(tmp_path, capsys):
    step, code, weights, logged = stopped_and_resumed(tmp_path / "a", process=0)
    assert (step, code) == (ASKED_AFTER + 1, 143)
    said = capsys.readouterr().err
    checkpoint = tmp_path / "a" / f"checkpoint-{step}"
    assert (
        f"Stopped by SIGTERM after step {step} of {STEPS}; saved {checkpoint}. To go on: "
        "trainer.train(resume_from_checkpoint=True)" in said
    )
    assert (weights, logged) == whole(tmp_path / "b")


def test_a_run_that_saves_only_the_model(tmp_path):
    """What it goes on from has the state of the optimizer too."""
    options = {"save_only_model": True, "save_strategy": "steps", "save_steps": 2}
    step, _, weights, logged = stopped_and_resumed(tmp_path / "a", process=0, **options)
    assert step % 2 == 0  # a step with a checkpoint of its own
    assert (weights, logged) == whole(tmp_path / "b")


def test_without_the_argument_nothing_listens(tmp_path):
    trainer = trainer_for(tmp_path, enable_jit_checkpoint=False, max_steps=1)
    assert trainer._stop is None
    trainer.train()


def test_another_thread_cannot_listen(tmp_path, caplog, capfd):
    trainer = trainer_for(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1
    said = caplog.text + capfd.readouterr().err
    assert "SIGTERM saves no checkpoint: training does not run in the main thread" in said


def killed_while_it_saves(folder):
    """A process that is killed when half of the checkpoint of a step has been written."""
    save = Trainer._save_rng_state

    def killed(self, output_dir):
        if self.state.global_step == ASKED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    Trainer._save_rng_state = killed
    trainer_for(Path(folder), save_strategy="steps", save_steps=1).train()


def test_killed_while_it_saves(tmp_path):
    folder = tmp_path / "a"
    process = subprocess.run([sys.executable, __file__, "killed", folder], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    left = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert left == ["_unfinished", f"checkpoint-{ASKED_AFTER - 1}"]
    trainer = trainer_for(folder, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert (digest(trainer), losses(trainer)) == whole(tmp_path / "b")
    assert not (folder / "_unfinished").exists()


def killed_at_the_end(folder):
    """A process that is killed when the weights of its last save are written, and nothing else of it."""
    tokenizer_class = type(make_tokenizer())
    tokenizer_class.save_pretrained = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    trainer = trainer_for(Path(folder), max_steps=1)
    trainer.train()
    trainer.save_model()


def test_killed_in_the_last_save(tmp_path):
    """What was there is there, to the last byte."""
    trainer = trainer_for(tmp_path / "a", max_steps=1, warmup_steps=0)
    trainer.save_model()

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.is_file()}

    before = files()
    assert any(path.name == "model.safetensors" for path in before)
    process = subprocess.run(
        [sys.executable, __file__, "killed at the end", tmp_path / "a"], capture_output=True
    )
    assert process.returncode == -signal.SIGKILL
    assert files() == before
    trainer.train()
    trainer.save_model()
    after = files()
    assert after.keys() == before.keys() and after != before


def main(folder):
    # The process that does not write the checkpoint is asked.
    step, code, weights, logged = stopped_and_resumed(Path(folder) / "a", process=1)
    report(folder, {"stopped": [step, code, weights, logged], "whole": whole(Path(folder) / "b")})


def test_two_processes(tmp_path):
    two_processes(__file__, tmp_path)
    first, second = reports(tmp_path)
    for each in (first, second):
        step, code, weights, logged = each["stopped"]
        # One step more: no step waits for what the others say.
        assert (step, code) == (ASKED_AFTER + 2, 143)
        assert [weights, logged] == each["whole"]
    assert first["whole"][0] == second["whole"][0]


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed_while_it_saves(sys.argv[2])
    if sys.argv[1] == "killed at the end":
        killed_at_the_end(sys.argv[2])
    main(*sys.argv[1:])
    end()
