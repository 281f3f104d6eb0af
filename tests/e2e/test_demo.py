"""`oddsmith demo`, shortened: it learns, is reproducible, and its output works."""

import json
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oddsmith import cli
from oddsmith.demo.run import STEPS, make_config, run_demo
from oddsmith.demo.score import mean_logps
from oddsmith.demo.tasks import TASKS, make_splits

SHORT = 120


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run's folder, results and printed text."""
    from contextlib import redirect_stdout
    from io import StringIO

    folder = tmp_path_factory.mktemp("demo")
    with redirect_stdout(StringIO()) as printed:
        results = run_demo(folder, steps=SHORT, seed=1)
    return folder, results, printed.getvalue()


def test_it_learns(finished):
    _, results, _ = finished
    before, after = results["before"]["all"], results["after"]["all"]
    assert before["accuracy"] == pytest.approx(0.5, abs=0.1)
    assert before["margin"] == pytest.approx(0.0, abs=0.05)
    assert before["exact"] < 0.02
    # An eighth of the complete run, which reaches more than 0.9.
    assert after["accuracy"] > 0.7
    assert after["margin"] > 0.1
    assert after["exact"] > 0.05


def test_the_table_agrees_with_the_trainers_evaluation(finished):
    _, results, _ = finished
    evaluations = [entry for entry in results["history"] if "eval_loss" in entry]
    for moment, evaluation in (("before", evaluations[0]), ("after", evaluations[-1])):
        mine = results[moment]["all"]
        assert evaluation["eval_rewards/accuracies"] == pytest.approx(mine["accuracy"], abs=0.005)
        assert evaluation["eval_rewards/margins"] == pytest.approx(mine["margin"], abs=1e-4)
    assert [entry["step"] for entry in evaluations] == [
        0,
        *range(SHORT // 5, SHORT + 1, SHORT // 5),
    ]


def test_the_folder_holds_everything(finished):
    folder, results, _ = finished
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["after"] == results["after"]
    assert (saved["steps"], saved["seed"]) == (SHORT, 1)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "data" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0].keys() == {"prompt", "chosen", "rejected"}
    assert len(rows) == 480


def test_the_saved_model_is_the_trained_one(finished):
    folder, results, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    _, test_rows = make_splits(12_000, 480, seed=1)
    gaps = mean_logps(model, tokenizer, test_rows, "chosen") - mean_logps(
        model, tokenizer, test_rows, "rejected"
    )
    accuracy = (gaps > 0).double().mean().item()
    assert accuracy == pytest.approx(results["after"]["all"]["accuracy"], abs=0.005)


def test_the_printed_table_has_a_line_for_each_task(finished):
    folder, results, printed = finished
    for name in [*(task.name for task in TASKS), "all"]:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name:<16}")]
        assert f"{results['before'][name]['accuracy']:.1%}" in line
        assert f"{results['after'][name]['accuracy']:.1%}" in line
        assert f"{results['after'][name]['margin']:+.3f}" in line
    assert str(folder) in printed


def test_the_printed_next_step_works(finished, tmp_path):
    folder, _, printed = finished
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("oddsmith train")]
    argv = shlex.split(line)[1:]
    assert cli.main([*argv, "--max_steps", "2", "--use_cpu", "--save_strategy", "no"]) == 0
    before = AutoModelForCausalLM.from_pretrained(folder / "model").lm_head.weight
    after = AutoModelForCausalLM.from_pretrained(folder / "more").lm_head.weight
    assert not torch.equal(before, after)


def test_the_same_seed_gives_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr("oddsmith.demo.run.TRAIN_ROWS", 360)
    monkeypatch.setattr("oddsmith.demo.run.TEST_ROWS", 60)
    runs = [run_demo(tmp_path / name, steps=3, seed=seed) for name, seed in
            (("a", 4), ("b", 4), ("c", 5))]  # fmt: skip
    assert runs[0]["before"] == runs[1]["before"]
    assert runs[0]["after"] == runs[1]["after"]
    assert runs[0]["after"] != runs[2]["after"]
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("a", "b")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="steps is 0; must be at least 1"):
        run_demo(tmp_path / "none", steps=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_any_number_of_steps_makes_a_schedule(steps, tmp_path):
    config = make_config(tmp_path, steps, seed=0)
    assert config.max_steps == steps
    assert 1 <= config.logging_steps <= max(1, steps // 50)
    assert config.eval_steps >= 1
