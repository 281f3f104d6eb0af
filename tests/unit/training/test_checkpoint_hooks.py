"""Checkpoints are whole or not there; tests/e2e/test_engine_kills.py kills processes."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.errors import CheckpointError
from oddsmith.training.checkpoint_hooks import STAGE
from oddsmith.training.checkpoints import is_whole
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs


class Look(TrainerCallback):
    """What there is when others are told of a checkpoint."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir or "")
        assert is_whole(folder / f"checkpoint-{state.global_step}")
        self.seen.append(sorted(path.name for path in folder.iterdir() if path.is_dir()))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def trainer_for(folder, tokenizer, rows=None, **changed):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    return ORPOTrainer(
        model=make_model("qwen3_tied", tokenizer),
        args=ORPOConfig(**arguments(folder, **{**options, **changed})),
        train_dataset=pairs(8) if rows is None else rows,
        eval_dataset=pairs(2, seed=9),
        processing_class=tokenizer,
        callbacks=[Look()],
    )


def folders(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def seen(trainer):
    (look,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Look))
    return look.seen


def test_a_checkpoint_appears_when_it_is_whole(tokenizer, tmp_path, monkeypatch):
    save = Trainer._save_checkpoint
    inside = []

    def watch(self, model, trial):
        save(self, model, trial)
        inside.append(folders(tmp_path))

    monkeypatch.setattr(Trainer, "_save_checkpoint", watch)
    trainer = trainer_for(tmp_path, tokenizer, save_total_limit=2)
    trainer.train()
    assert inside[0] == [STAGE] and f"checkpoint-{3}" not in inside[2]
    assert seen(trainer) == [
        ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]
    ]  # fmt: skip
    monkeypatch.undo()
    other = trainer_for(tmp_path, tokenizer, max_steps=4)
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 4 and len(seen(other)) == 1


def test_the_best_one_has_its_own_name(tokenizer, tmp_path):
    trainer = trainer_for(
        tmp_path, tokenizer, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_loss", greater_is_better=True, save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(tmp_path / best)
    # The newest one and the best one, which its file names.
    assert folders(tmp_path) == sorted({best, "checkpoint-3"})
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / best)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("_save_rng_state", OSError(errno.ENOSPC, "No space left on device")),
        ("save_model", OSError(errno.EDQUOT, "Disk quota exceeded")),
        (
            "_save_optimizer_and_scheduler",
            RuntimeError("[enforce fail] PytorchStreamWriter failed"),
        ),
    ],
)
def test_a_full_disk_ends_the_run_in_a_sentence(where, error, tokenizer, tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, tokenizer)
    save = getattr(Trainer, where)

    def full(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise error
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, where, full)
    with pytest.raises(CheckpointError) as raised:
        trainer.train()
    first = tmp_path / "checkpoint-1"
    assert str(raised.value) == (
        f"{tmp_path / 'checkpoint-2'} was not saved: {error}. {first} is whole; to go on from there: "
        "trainer.train(resume_from_checkpoint=True)"
    )
    assert folders(tmp_path) == ["checkpoint-1"] and is_whole(first)


@pytest.mark.parametrize("error", [ZeroDivisionError("a fault"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error, tokenizer, tmp_path, monkeypatch):
    def wrong(self, *args):
        raise error

    monkeypatch.setattr(Trainer, "_save_rng_state", wrong)
    with pytest.raises(type(error)):
        trainer_for(tmp_path, tokenizer).train()
    assert folders(tmp_path) == []


def test_nothing_of_an_earlier_run_is_left_in_it(tokenizer, tmp_path):
    for name in ("checkpoint-1", f"{STAGE}/checkpoint-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model-00001-of-00002.safetensors").write_text("old")
    trainer_for(tmp_path, tokenizer, max_steps=1).train()
    assert folders(tmp_path) == ["checkpoint-1"]
    assert not list((tmp_path / "checkpoint-1").glob("model-*"))


def test_what_is_uploaded_is_in_its_place(tokenizer, tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append(Path(folder))
        assert is_whole(pushed[-1])

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *args, **kwargs: None)
    trainer = trainer_for(tmp_path, tokenizer, max_steps=2)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda **kwargs: None)
    trainer.train()
    assert pushed == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]


def test_a_stream_goes_on_in_its_second_pass(tokenizer, tmp_path):
    """Three batches a pass, the last of which begins a step: transformers skipped four of the first pass."""

    def losses(folder, resume):
        trainer = trainer_for(folder, tokenizer, pairs(6).to_iterable_dataset(), max_steps=5)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = losses(tmp_path / "whole", None)
    for step in (2, 4, 5):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert losses(tmp_path / "other", str(checkpoint)) == whole


def test_no_checkpoint_is_removed_under_its_name(tokenizer, tmp_path, monkeypatch):
    removed, remove = [], shutil.rmtree

    def watch(path, *args, **kwargs):
        if Path(path).exists():
            removed.append(Path(path).name)
        remove(path, *args, **kwargs)

    monkeypatch.setattr("shutil.rmtree", watch)
    # The last one is not the best: with a limit of one, the end of the run removes it.
    trainer = trainer_for(
        tmp_path, tokenizer, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_loss", greater_is_better=True, save_total_limit=1, learning_rate=0.01,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step in (1, 2)
    assert folders(tmp_path) == [f"checkpoint-{trainer.state.best_global_step}"]
    assert removed and set(removed) == {STAGE}
