"""Metrics of micro-batches: averages, counts, and one read for all of them."""

from types import SimpleNamespace

import pytest
import torch

from oddsmith.training.metrics import (
    MetricStore,
    PairScores,
    batch_share,
    evaluation_weights,
    pair_metrics,
)


class Processes:
    """A fake accelerate Accelerator: every process has the same numbers, times its rank."""

    device = torch.device("cpu")

    def __init__(self, factors=(1.0,)):
        self.factors, self.reads = factors, 0

    def gather(self, tensor):
        self.reads += 1
        return torch.cat([tensor * factor for factor in self.factors])


def test_average_over_micro_batches():
    store = MetricStore()
    for value in (1.0, 2.0, 6.0):
        store.add("train", {"a": torch.tensor(value), "b": torch.tensor(-value)})
    processes = Processes()
    assert store.pop("train", processes) == {"a": pytest.approx(3.0), "b": pytest.approx(-3.0)}
    assert processes.reads == 1
    assert store.pop("train", processes) == {}


def test_splits_are_apart():
    store = MetricStore()
    store.add("train", {"a": torch.tensor(1.0)})
    store.add("eval", {"eval_a": torch.tensor(5.0)})
    assert store.pop("eval", Processes()) == {"eval_a": 5.0}
    assert store.pop("train", Processes()) == {"a": 1.0}


def test_average_over_processes():
    store = MetricStore()
    # Rank 1 has seen twice the sum and twice the weight of rank 0: the average is the same.
    store.add("train", {"a": torch.tensor(3.0), "empty_completions": torch.tensor(2)})
    assert store.pop("train", Processes((1.0, 2.0))) == {"a": 3.0, "empty_completions": 6.0}


def test_numbers_are_taken_as_they_are():
    store = MetricStore()
    store.add("train", {"mine": 2.0})
    store.add("train", {"mine": 4})
    processes = Processes((1.0, 2.0))
    assert store.pop("train", processes) == {"mine": 3.0}
    assert processes.reads == 0


def test_weights():
    store = MetricStore()
    store.add("eval", {"a": torch.tensor(1.0)}, weight=1.0)
    store.add("eval", {"a": torch.tensor(4.0)}, weight=0.5)
    store.add("eval", {"a": torch.tensor(float("nan"))}, weight=0.0)
    assert store.pop("eval", Processes())["a"] == pytest.approx((1.0 + 2.0) / 1.5)


def test_weights_of_single_metrics():
    store = MetricStore()
    for value, tokens in ((1.0, 3), (5.0, 1), (float("nan"), 0)):
        metrics = {"mean": torch.tensor(value), "pair": torch.tensor(1.0), "number": value}
        weights = {"mean": torch.tensor(tokens)}
        store.add("eval", metrics, weight=float(tokens > 0), weights=weights)
    found = store.pop("eval", Processes())
    assert found == {"mean": (3 * 1.0 + 5.0) / 4, "pair": 1.0, "number": pytest.approx(3.0)}


def test_keeps_digits_over_many_micro_batches():
    store = MetricStore()
    for _ in range(3000):
        store.add("train", {"a": torch.tensor(0.1)})
    assert store.pop("train", Processes())["a"] == pytest.approx(
        float(torch.tensor(0.1)), rel=1e-12
    )


def test_watch_finds_the_first_step():
    store = MetricStore()
    for step, loss in ((3, 1.0), (4, float("inf")), (5, float("nan"))):
        store.watch("train", torch.tensor(loss), step)
    assert store.pop("train", Processes()) == {"_non_finite": 2.0, "_first_non_finite": 4.0}
    store.watch("train", torch.tensor(1.0), 6)
    assert store.pop("train", Processes())["_non_finite"] == 0.0


def state(processes, rank, end, remainder):
    gradient_state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    return SimpleNamespace(
        num_processes=processes, process_index=rank, gradient_state=gradient_state
    )


@pytest.mark.parametrize(("rank", "expected"), [(0, 4), (1, 2), (2, 0)])
def test_share_of_a_filled_up_batch(rank, expected):
    # Three processes with four pairs each; six of the twelve are real.
    assert batch_share(state(3, rank, True, 6), 4) == expected


def test_share_of_a_full_batch():
    assert batch_share(state(3, 1, False, 6), 4) == 4
    assert batch_share(state(3, 1, True, 0), 4) == 4
    assert batch_share(state(1, 0, True, 2), 4) == 4


def scores(whole):
    values = torch.tensor([-1.0, -2.0, -4.0])
    zero = torch.tensor(0.25)
    return PairScores(
        loss=zero,
        nll_loss=zero,
        chosen_logps=values,
        rejected_logps=values - 1.0,
        chosen_rewards=0.5 * values,
        rejected_rewards=0.5 * torch.tensor([-2.0, -1.0, -6.0]),
        log_odds_ratio=values,
        log_odds_chosen=torch.tensor(7.0),  # a mean already
        chosen_logits=zero,
        rejected_logits=zero,
        whole=torch.tensor(whole),
        aux_loss=None,
        nll_tokens=torch.tensor(11),
        chosen_tokens=torch.tensor(12),
        rejected_tokens=torch.tensor(13),
    )


def test_pair_metrics():
    metrics = pair_metrics(scores([True, True, True]), 3)
    assert metrics["rewards/accuracies"] == pytest.approx(2 / 3)
    assert metrics["rewards/margins"] == pytest.approx(0.5 * (1.0 - 1.0 + 2.0) / 3)
    assert metrics["logps/chosen"] == pytest.approx(-7 / 3)
    assert metrics["log_odds_chosen"] == 7.0
    assert metrics["empty_completions"] == 0


def test_pair_metrics_exclude_empty_and_repeated_pairs():
    metrics = pair_metrics(scores([True, False, True]), 3)
    assert metrics["logps/rejected"] == pytest.approx((-2.0 - 5.0) / 2)
    assert metrics["empty_completions"] == 1
    metrics = pair_metrics(scores([True, False, True]), 2)
    assert metrics["logps/rejected"] == pytest.approx(-2.0)
    assert pair_metrics(scores([True, True, True]), 0)["rewards/chosen"] == 0.0


def test_an_evaluation_counts_tokens_and_whole_pairs():
    weights = evaluation_weights(scores([True, False, True]), 3, "eval_")
    assert weights.pairs == 3.0
    assert weights.others["eval_rewards/chosen"] == weights.others["eval_log_odds_ratio"] == 2
    names = ("nll_loss", "logits/chosen", "logits/rejected")
    assert [int(weights.others[f"eval_{name}"]) for name in names] == [11, 12, 13]
    # A batch that only fills a step up.
    weights = evaluation_weights(scores([True, True, True]), 0, "eval_")
    assert weights.pairs == 0.0 and not any(weights.others.values())
