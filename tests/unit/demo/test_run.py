"""The demo's table, samples, files and progress bar; tests/e2e/test_demo.py runs all of it."""

import json
from types import SimpleNamespace

import pytest

from oddsmith.demo import run as demo
from oddsmith.demo.tasks import TASKS


def test_the_table_by_hand():
    name = TASKS[0].name
    before = {
        name: {"accuracy": 0.5, "margin": -0.0123, "exact": 0.0},
        "all": {"accuracy": 0.25, "margin": 0.0, "exact": 0.125},
    }
    after = {
        name: {"accuracy": 1.0, "margin": 0.25, "exact": 0.875},
        "all": {"accuracy": 0.75, "margin": 0.5, "exact": 0.5},
    }
    *_, first, last = demo.format_table(before, after).splitlines()
    assert first.split() == [*name.split(), "50.0%", "100.0%", "-0.012", "+0.250", "0.0%", "87.5%"]
    assert last.split() == ["all", "25.0%", "75.0%", "+0.000", "+0.500", "12.5%", "50.0%"]
    # Tasks without rows have no line: two of the head, and these two.
    assert len(demo.format_table(before, after).splitlines()) == 4


def test_samples_are_the_first_of_each_task_with_a_verdict(monkeypatch):
    def row(task, question, right):
        said = [{"role": "user", "content": question}]
        return {"task": task, "prompt": said, "chosen": [{"content": right}]}

    rows = [row("add", "1+1", "2"), row("add", "2+2", "4"), row("sort", "3 1", "1 3")]
    monkeypatch.setattr(demo, "answer", lambda model, tokenizer, rows: [" 2 ", "3 1"][: len(rows)])
    first, second = demo.format_samples(None, None, rows).splitlines()
    assert first.split() == ["1+1", "2", "right"]
    assert second.split() == ["3", "1", "3", "1", "wrong:", "1", "3"]


def test_rows_are_written_without_the_task(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "task": "add"}]
    demo.write_rows(rows * 2, tmp_path / "data" / "train.jsonl")
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "a", "chosen": "b", "rejected": "c"}
    ] * 2


@pytest.mark.parametrize(
    ("steps", "logging", "evaluation"), [(1, 1, 1), (100, 2, 20), (900, 18, 180)]
)
def test_a_run_is_logged_fifty_times_and_evaluated_five_times(steps, logging, evaluation, tmp_path):
    config = demo.make_config(tmp_path, steps, seed=5)
    assert (config.max_steps, config.seed) == (steps, 5)
    assert (config.logging_steps, config.eval_steps) == (logging, evaluation)
    assert config.use_cpu and not config.bf16 and config.nll_scope == "completion"


def test_the_bar_shows_what_is_logged():
    bar = demo.CompactProgress()
    bar.on_log(None, None, None, {"rewards/margins": 1.0})  # an evaluation before training
    bar.on_train_begin(None, SimpleNamespace(max_steps=8), None)
    bar.on_step_end(None, SimpleNamespace(global_step=3), None)
    bar.on_log(None, None, None, {"eval_loss": 3.0})
    assert (bar.bar.n, bar.bar.postfix) == (3, None)
    # transformers may log numbers as text.
    logs = {"loss": "1.25", "rewards/margins": 0.5, "rewards/accuracies": 0.75}
    bar.on_log(None, None, None, logs)
    assert bar.bar.postfix == "loss=1.250, margin=+0.500, accuracy=75%"
    bar.on_train_end(None, None, None)
    assert bar.bar.disable  # closed


def test_no_steps_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="steps is 0; must be at least 1"):
        demo.run_demo(tmp_path / "out", steps=0)
    assert not (tmp_path / "out").exists()
