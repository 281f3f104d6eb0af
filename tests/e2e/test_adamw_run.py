"""Complete runs with 8-bit and paged AdamW: learning, resuming after a kill, a full disk, two
processes.

Run as a script this file is what the processes of a test run.
"""

import errno
import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from oddsmith.optim.adamw.saved_state import unwrap
from oddsmith.training.adamw_names import ADAMW_NAMES
from support import optim_runs
from support.optim_runs import (
    SAVED,
    Kill,
    check_same_end,
    checkpoint,
    killed_run,
    sums,
)
from support.processes import end, report, reports, two_processes
from support.trainer_runs import long_pairs, pairs, train_logs

# PEFT reads a name that transformers 5.2x deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NAMES = sorted(ADAMW_NAMES)
# Matrices of 48 x 24 have 8-bit moments too, norms do not.
run = functools.partial(optim_runs.run, optim_args="min_8bit_size=1000", learning_rate=3e-3)


def optimizer_of(trainer):
    return trainer.optimizer.optimizer


def saved_states(folder):
    states = torch.load(f"{folder}/optimizer.pt", weights_only=True)["state"]
    return {key: unwrap(state) for key, state in states.items()}


@pytest.mark.parametrize("name", NAMES)
def test_resumes_bit_for_bit(name, tmp_path):
    through = run(tmp_path / "through", optim=name)
    saved = checkpoint(tmp_path / "through")
    states = saved_states(saved)
    assert {state["step"] for state in states.values()} == {SAVED}
    bits = {state["state1"].dtype for state in states.values()}
    both = {torch.uint8, torch.float32}
    assert bits == (both if "8bit" in name else {torch.float32})
    resumed = run(tmp_path / "resumed", resume=saved, optim=name)
    assert isinstance(optimizer_of(resumed), AdamW8bit)
    check_same_end(resumed, through)


def test_resumes_after_a_kill(tmp_path):
    """No pages of the killed process are left."""
    name = "paged_adamw_8bit"
    pages = tmp_path / "pages"
    pages.mkdir()
    options = {"optim": name, "optim_args": f"min_8bit_size=1000,page_dir={pages}"}
    saved = killed_run(__file__, tmp_path / "killed", name, options["optim_args"])
    assert os.listdir(pages) == []
    through = run(tmp_path / "through", **options)
    check_same_end(run(tmp_path / "resumed", resume=saved, **options), through)


def test_a_run_resumes_with_another_optimizer(tmp_path):
    """From 8 bits to 32 in pages at a checkpoint: the results are close."""
    through = run(tmp_path / "through", optim="adamw_8bit")
    resumed = run(
        tmp_path / "resumed", resume=checkpoint(tmp_path / "through"), optim="paged_adamw_32bit"
    )
    states = optimizer_of(resumed).state
    assert isinstance(optimizer_of(resumed), PagedAdamW32bit)
    assert all(state["state1"].dtype == torch.float32 for state in states.values())
    first, last = train_logs(through)[0]["loss"], train_logs(through)[-1]["loss"]
    assert first - last > 0.01
    assert train_logs(resumed)[-1]["loss"] == pytest.approx(last, abs=0.05 * (first - last))


@pytest.mark.parametrize("name", NAMES)
def test_margins_rise(name, tmp_path):
    trainer = run(
        tmp_path, optim=name, rows=pairs(8), max_steps=30, save_strategy="no", logging_steps=5
    )
    first, *_, last = train_logs(trainer)
    assert last["rewards/margins"] > first["rewards/margins"]
    assert last["loss"] < 0.9 * first["loss"]
    assert optimizer_of(trainer).nonfinite == 0


def test_adapters_are_trained_in_pages(tmp_path):
    lora = LoraConfig(
        r=24, lora_alpha=32, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    options = {"optim": "paged_adamw_8bit", "peft_config": lora, "learning_rate": 2e-2}
    through = run(tmp_path / "through", **options)
    optimizer = optimizer_of(through)
    assert isinstance(optimizer, PagedAdamW8bit) and len(optimizer.state) == 2 * 2 * 2
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}
    assert train_logs(through)[-1]["loss"] < train_logs(through)[0]["loss"]
    resumed = run(tmp_path / "resumed", resume=checkpoint(tmp_path / "through"), **options)
    check_same_end(resumed, through)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    through = run(tmp_path / "run", optim="paged_adamw_8bit")
    saved = checkpoint(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in Path(saved).iterdir()}

    def full(handle, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="The run can go on from its last checkpoint"):
            run(tmp_path / "run", resume=saved, optim="paged_adamw_8bit")
    assert before == {path.name: path.read_bytes() for path in Path(saved).iterdir()}
    check_same_end(run(tmp_path / "resumed", resume=saved, optim="paged_adamw_8bit"), through)


def test_two_processes_equal_one(tmp_path):
    """Rows of one length: the mean over a large batch is the mean of the means of its halves."""
    two_processes(__file__, "two", tmp_path)
    results = reports(tmp_path)
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        assert results[0][name] == results[1][name]  # to the bit
        alone = distributed_run(tmp_path, name, per_device_train_batch_size=4)
        for key, value in sums(alone).items():
            assert results[0][name][key] == pytest.approx(value, rel=1e-3, abs=2e-2), key


def distributed_run(folder, name, **changed):
    options = {
        "max_length": 24, "gradient_accumulation_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 2, "max_steps": 5, "learning_rate": 1e-3,
    }  # fmt: skip
    return run(folder, optim=name, rows=long_pairs(24), **{**options, **changed})


def two(folder):
    trainers = {name: distributed_run(folder, name) for name in ("adamw_8bit", "paged_adamw_8bit")}
    assert {trainer.accelerator.num_processes for trainer in trainers.values()} == {2}
    report(folder, {name: sums(trainer) for name, trainer in trainers.items()})


if __name__ == "__main__":
    if sys.argv[1] == "two":
        two(sys.argv[2])
        end()
    else:
        folder, name, optim_args = sys.argv[2:]
        run(folder, optim=name, optim_args=optim_args, callbacks=[Kill()])
