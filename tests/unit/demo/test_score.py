"""The demo's scores."""

import pytest
import torch

from oddsmith.demo.score import answer, mean_logps, score
from oddsmith.demo.tasks import TASKS


def test_mean_logps_are_those_of_the_completion_alone(model, tokenizer, rows):
    some = [rows[0], rows[2], rows[5]]  # completions and prompts of different lengths
    got = mean_logps(model, tokenizer, some, "rejected")
    for row, value in zip(some, got, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["rejected"], return_dict=False)
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        terms = [logps[at - 1, whole[at]] for at in range(len(prompt), len(whole))]
        torch.testing.assert_close(value, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_answers_do_not_depend_on_the_padding_of_a_batch(model, tokenizer, rows):
    some = rows[:6]
    alone = [answer(model, tokenizer, [row])[0] for row in some]
    assert answer(model, tokenizer, some) == alone


def test_scores_average_over_tasks_and_scale_with_beta(model, tokenizer, rows):
    scores = score(model, tokenizer, rows, beta=0.25)
    assert list(scores) == ["all", *(task.name for task in TASKS)]
    gaps = mean_logps(model, tokenizer, rows, "chosen") - mean_logps(
        model, tokenizer, rows, "rejected"
    )
    assert scores["all"]["accuracy"] == pytest.approx((gaps > 0).double().mean().item())
    assert scores["all"]["margin"] == pytest.approx(0.25 * gaps.double().mean().item(), rel=1e-6)
    for metric in ("accuracy", "margin", "exact"):
        by_task = [scores[task.name][metric] for task in TASKS]
        assert scores["all"][metric] == pytest.approx(sum(by_task) / len(by_task), abs=1e-9)
    doubled = score(model, tokenizer, rows[:12], beta=0.5)
    single = score(model, tokenizer, rows[:12], beta=0.25)
    assert doubled["all"]["margin"] == pytest.approx(2 * single["all"]["margin"])


def test_a_model_that_knows_the_answers_scores_full_marks(tokenizer, rows, monkeypatch):
    right = [row["chosen"][0]["content"] for row in rows]
    monkeypatch.setattr("oddsmith.demo.score.answer", lambda *_: right)
    monkeypatch.setattr(
        "oddsmith.demo.score.mean_logps",
        lambda model, tokenizer, rows, side: torch.full(
            (len(rows),), -1.0 if side == "chosen" else -3.0
        ),
    )
    model = torch.nn.Linear(1, 1)
    assert score(model, tokenizer, rows, beta=0.5)["all"] == {
        "accuracy": 1.0,
        "margin": 1.0,
        "exact": 1.0,
    }
    assert model.training
