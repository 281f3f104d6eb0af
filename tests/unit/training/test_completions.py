"""Completions of an evaluation: rows, logs, and no effect on training."""

import json

import pytest
import torch
from datasets import Dataset

from oddsmith.training.completions import (
    completion_of,
    log_completions,
    pick_rows,
    untouched_randomness,
)

ROWS = [{"prompt": f"q{i}"} for i in range(9)]


def test_rows_are_drawn_by_the_seed():
    rows = Dataset.from_list(ROWS)
    drawn = pick_rows(rows, 4, seed=3)
    assert len({row["prompt"] for row in drawn}) == 4
    assert drawn == pick_rows(rows, 4, seed=3)
    assert any(drawn != pick_rows(rows, 4, seed) for seed in range(4, 8))
    everything = pick_rows(rows, 40, seed=3)
    assert sorted(row["prompt"] for row in everything) == [row["prompt"] for row in ROWS]
    assert pick_rows(rows.to_iterable_dataset(), 2, seed=3) == ROWS[:2]


def test_sampling_leaves_the_run_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with untouched_randomness():
        torch.rand(100)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("text", "prompt", "completion"),
    [("What? Yes", "What?", " Yes"), ("What?", "What?", ""), ("cut? Yes", "What?", "cut? Yes")],
)
def test_what_follows_the_prompt(text, prompt, completion):
    assert completion_of(text, prompt) == completion


def test_the_file_and_the_log(tmp_path, caplog):
    rows = [("Was?\n", "Übung"), ("q" * 300, "short")]
    path = log_completions(rows, str(tmp_path), 42, "eval_hard", [])
    assert path == tmp_path / "completions" / "eval_hard_000042.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"Prompt": prompt, "Policy": completion} for prompt, completion in rows
    ]
    assert "Übung" in lines[0]
    head, first, second = caplog.records[-1].getMessage().splitlines()
    assert head == f"Completions at step 42, also in {path}:"
    assert first == '"Was?\\n" -> "Übung"'
    # 200 characters with the quote at the start and the dots at the end.
    assert second == '"' + "q" * 198 + '… -> "short"'
