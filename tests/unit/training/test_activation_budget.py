"""How many bytes of activations may be kept."""

import pytest
import torch

from oddsmith.training import activation_budget
from oddsmith.training.activation_budget import ActivationBudget, memory_text

HOST = torch.device("cpu")


def test_bytes_are_the_budget_of_each_batch():
    budget = ActivationBudget(1000, HOST)
    budget.before_first_step()
    budget.after_batch(10)
    assert (budget(1), budget(500)) == (1000, 1000)


@pytest.mark.parametrize("processes, expected", [(None, 2000.0), ("4", 500.0)])
def test_auto_is_a_share_of_what_the_host_has(monkeypatch, processes, expected):
    monkeypatch.setattr(activation_budget.memory, "available", lambda: 4000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    budget = ActivationBudget("auto", HOST)
    assert budget(5) == 0  # the optimizer has no state yet
    budget.look()
    assert budget.bytes == budget(5) == expected


def test_auto_where_it_is_not_known_what_the_host_has(monkeypatch):
    monkeypatch.setattr(activation_budget.memory, "available", lambda: None)
    budget = ActivationBudget("auto", HOST)
    budget.look()
    assert budget.bytes == 0


def test_auto_on_a_gpu(monkeypatch):
    """Of 1000 bytes, weights of 200 and moments of 100 are there, and a step needs 240 more."""
    now = {"allocated": 200, "reserved": 200, "peak": 200, "other": 60}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: now["allocated"])
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: now["reserved"])
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: now["peak"])
    monkeypatch.setattr(
        cuda, "mem_get_info", lambda device: (1000 - now["other"] - now["reserved"], 1000)
    )
    budget = ActivationBudget("auto", torch.device("cuda"))
    budget.before_first_step()
    now.update(reserved=500, peak=440)
    budget.after_batch(30)
    assert budget(30) == 0
    now.update(allocated=300, reserved=520)
    # 1000 less 60 of others, 300 that are in use, and 50 for gaps.
    budget.look()
    assert budget.bytes == pytest.approx(590)
    assert budget(30) == pytest.approx(590 - 240)
    assert budget(10) == pytest.approx(590 - 240)
    assert budget(60) == pytest.approx(590 - 480)  # a batch twice as long needs twice as much
    assert budget(300) == 0
    now.update(peak=900)
    budget.after_batch(60)  # with kept layers: the peak tells nothing
    assert budget(30) == pytest.approx(590 - 240)


def test_after_memory_has_run_out():
    budget = ActivationBudget(1000, HOST)
    with budget.nothing():
        assert budget(5) == 0
    budget.halve()
    assert budget(5) == 500


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (25e6, "25 MB"), (1.234e9, "1.23 GB")],
)
def test_sizes_as_they_are_given(size, text):
    assert memory_text(size) == text
