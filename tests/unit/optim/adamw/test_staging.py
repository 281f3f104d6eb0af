"""Steps with staged state: pieces, batches, and bit-identical results."""

import pytest
import torch

from oddsmith.optim import AdamW8bit, PagedAdamW8bit
from oddsmith.optim.adamw.moments import blocks_of, layout, maps
from oddsmith.optim.adamw.saved_state import unwrap
from oddsmith.optim.adamw.staging import Staged, batches, bytes_of
from oddsmith.optim.adamw.step import AdamUpdate, NonFinite, adamw_step, rule_of
from support.gradients import given, randn, weights_of

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}


SHAPES = [(67, 71), (9, 13), (), (0, 3), (64, 65)]


LEAST_BUDGET = 3 * (4 * 256 + 8 * 256)


def grads_of(step):
    return [randn(*shape, seed=10 * step + i) for i, shape in enumerate(SHAPES)]


def same_states(one, other):
    one, other = one.state_dict()["state"], other.state_dict()["state"]
    assert one.keys() == other.keys()
    for key in one:
        mine, theirs = unwrap(one[key]), unwrap(other[key])
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() - {"step"})


def update_of(shape, bits, step, dtype, seed=None):
    value = randn(*shape, seed=len(shape) + bits).to(dtype)
    state = {name: torch.zeros(size, dtype=kind) for name, (size, kind) in
             layout(value.shape, bits).items()}  # fmt: skip
    if bits == 8:
        state |= dict(zip(("qmap1", "qmap2"), maps(value.device)))
    rule = rule_of(RULE, step)
    return AdamUpdate(value, randn(*shape, seed=step).to(dtype), state, rule, seed)


def updates_of(step=1, dtype=torch.float32, seed=None):
    kinds = [((67, 71), 8), ((9, 13), 32), ((0, 3), 32), ((64, 65), 32), ((300,), 8), ((), 32)]
    return [update_of(shape, bits, step, dtype, seed) for shape, bits in kinds]


@pytest.mark.parametrize("budget", [LEAST_BUDGET, 20_000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_no_bit(budget, dtype):
    """Stochastic rounding depends on an element's index in the parameter, not in the piece."""
    whole, parts = updates_of(dtype=dtype, seed=7), updates_of(dtype=dtype, seed=7)
    staged, bad = Staged(torch.device("cpu"), budget), NonFinite()
    for step in range(1, 5):
        for update in (*whole, *parts):
            update.rule, update.grad = rule_of(RULE, step), update.grad.roll(1)
        adamw_step(whole, bad)
        staged.step(parts, bad)
    staged.synchronize()
    for mine, theirs in zip(parts, whole):
        assert torch.equal(mine.value, theirs.value)
        assert all(torch.equal(mine.state[key], theirs.state[key]) for key in theirs.state)
    assert bad.total() == 0


@pytest.mark.parametrize("capacity", [LEAST_BUDGET // 3, 5_120, 12_544, 1 << 20])
def test_batches_have_every_element_once_and_fit(capacity):
    updates, found = updates_of(), []
    for batch in batches(updates, capacity):
        room = 0
        for piece in batch:
            host = piece.host()
            assert piece.start % 256 == 0 and piece.stop > piece.start
            assert host["state1"].numel() == piece.stop - piece.start
            if "absmax1" in host:
                assert host["absmax1"].numel() == blocks_of(piece.stop - piece.start)
            room += sum(-(-part.nbytes // 256) * 256 for part in host.values())
            found.append((id(piece.update), piece.start, piece.stop))
        assert 0 < room <= capacity
        assert room == sum(bytes_of(p.update.state, p.stop - p.start) for p in batch)
    for update in updates:
        ends = [(start, stop) for owner, start, stop in found if owner == id(update)]
        joints = [0, *(stop for _, stop in ends)]
        assert [start for start, _ in ends] == joints[:-1] and joints[-1] == update.value.numel()
    owners = [owner for owner, _, _ in found]
    assert owners == sorted(owners, key=[id(update) for update in updates].index)
    cut = len(found) > sum(update.value.numel() > 0 for update in updates)
    assert cut == (capacity < 20_000)


def test_a_budget_without_room_for_a_block_is_refused():
    with pytest.raises(ValueError, match=f"device_budget is {LEAST_BUDGET - 1}; must be at least"):
        Staged(torch.device("cpu"), LEAST_BUDGET - 1)
    assert Staged(torch.device("cpu"), LEAST_BUDGET).capacity == LEAST_BUDGET // 3


def test_a_step_goes_through_the_budget(monkeypatch):
    """As on a GPU, except that copies are within the same memory."""
    ours, theirs = weights_of(SHAPES), weights_of(SHAPES)
    optimizer = PagedAdamW8bit(ours, **RULE, device_budget=LEAST_BUDGET)
    peer = AdamW8bit(theirs, **RULE)
    monkeypatch.setattr(optimizer, "_run", lambda updates: through(optimizer, updates))
    for step in range(3):
        given(optimizer, grads_of(step))
        given(peer, grads_of(step))
    assert all(map(torch.equal, ours, theirs))
    same_states(optimizer, peer)


def through(optimizer, updates):
    staged = Staged(torch.device("cpu"), optimizer._device_budget)
    optimizer._staged[torch.device("cpu")] = staged
    staged.step(updates, optimizer._bad)


def test_a_budget_without_room_for_a_block_is_refused_before_any_step():
    with pytest.raises(ValueError, match="device_budget is 5000; must be at least 9216 bytes"):
        PagedAdamW8bit([torch.nn.Parameter(torch.ones(3))], device_budget=5000)
