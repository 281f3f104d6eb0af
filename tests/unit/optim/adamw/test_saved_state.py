"""The saved state of 8-bit AdamW: layout, conversions, and states that do not fit."""

import copy
import io

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from oddsmith.optim.adamw.moments import decode, has_our_maps
from oddsmith.optim.adamw.saved_state import WRAPPED, converted, unwrap, wrap
from oddsmith.quant.nf4 import dynamic_map
from support.gradients import given, randn, weights_of

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
# 8 bits with a partial block, 32 bits, a scalar, and 8 bits in another group.
SHAPES = [(67, 71), (9, 13), (), (64, 65)]


def make(kind=AdamW8bit, steps=0, shapes=SHAPES, **options):
    weights = weights_of(shapes)
    groups = [{"params": weights[:3]}, {"params": weights[3:], "lr": 0.05}]
    optimizer = kind(groups, **{**RULE, **options})
    for step in range(steps):
        given(optimizer, grads_of(step, shapes))
    return optimizer, weights


def grads_of(step, shapes=SHAPES):
    return [randn(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)]


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one, other):
    """Equal groups, and bit-identical states."""
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        mine, theirs = unwrap(state), unwrap(other["state"][key])
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() - {"step"})


def test_the_layout_is_that_of_bitsandbytes():
    optimizer, _ = make(steps=2)
    states = optimizer.state_dict()["state"]
    assert [set(states[key]) for key in range(4)] == [{"step", WRAPPED}] * 4
    eight = {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
    names = [set(states[key][WRAPPED]) for key in range(4)]
    assert names == [eight, {"state1", "state2"}, {"state1", "state2"}, eight]
    inner = states[0][WRAPPED]
    assert inner["state1"].shape == (67, 71) and inner["state1"].dtype == torch.uint8
    assert inner["absmax2"].shape == (19,) and inner["qmap1"].shape == (256,)
    assert all(type(state["step"]) is int for state in states.values())
    assert unwrap(wrap({"step": 3, **inner})) == {"step": 3, **inner}
    assert wrap({"step": 3}) == {"step": 3}


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit, PagedAdamW32bit])
def test_it_resumes_bit_for_bit(kind):
    optimizer, weights = make(kind, steps=3)
    again, copies = make(kind)
    for weight, start in zip(copies, weights):
        weight.data.copy_(start.data)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    same(optimizer.state_dict(), again.state_dict())
    for step in (3, 4):
        given(optimizer, grads_of(step))
        given(again, grads_of(step))
    assert all(map(torch.equal, weights, copies))
    same(optimizer.state_dict(), again.state_dict())


def test_loading_copies():
    optimizer, _ = make(steps=2)
    second, _ = make()
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    second.load_state_dict(saved)
    given(second, grads_of(2))
    same(before, optimizer.state_dict())


def test_bits_are_those_of_the_optimizer_that_loads():
    eight, _ = make(steps=2)
    full, _ = make(PagedAdamW32bit)
    full.load_state_dict(eight.state_dict())
    state, codes = full.state_dict(), eight.state_dict()["state"]
    assert [set(state["state"][key][WRAPPED]) for key in range(4)] == [{"state1", "state2"}] * 4
    for key in (0, 3):
        moments = state["state"][key][WRAPPED]
        for name, moment in zip(("state1", "state2"), decode(unwrap(codes[key]))):
            assert torch.equal(moments[name], moment)
    # And back: decoded moments get the same codes again.
    back, _ = make()
    back.load_state_dict(through_a_file(state))
    same(back.state_dict(), eight.state_dict())


def test_how_state_is_kept_stays_that_of_the_optimizer():
    """Otherwise parameters whose first gradient comes after a change of optimiser would be of the
    old kind."""
    saved = make(steps=1, min_8bit_size=5_000)[0].state_dict()
    for kind, bits in ((AdamW8bit, 8), (PagedAdamW32bit, 32)):
        optimizer, weights = make(kind)
        optimizer.load_state_dict(saved)
        assert {group["optim_bits"] for group in optimizer.param_groups} == {bits}
        assert {group["min_8bit_size"] for group in optimizer.param_groups} == {4096}
        given(optimizer, grads_of(1))
        dtype = torch.uint8 if bits == 8 else torch.float32
        assert optimizer.state[weights[0]]["state1"].dtype == dtype


def test_rates_are_those_that_were_saved():
    optimizer, _ = make(steps=1)
    LambdaLR(optimizer, lambda step: 0.5)
    saved = through_a_file(optimizer.state_dict())
    for group in saved["param_groups"]:  # as bitsandbytes has them
        group |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    second, _ = make(lr=0.7, betas=(0.1, 0.2), eps=0.3, weight_decay=0.4, stochastic_rounding=True)
    second.load_state_dict(saved)
    assert second.param_groups[0].keys() == optimizer.param_groups[0].keys()
    for mine, theirs in zip(second.param_groups, optimizer.param_groups):
        for name in ("lr", "betas", "eps", "weight_decay", "initial_lr"):
            assert mine[name] == theirs[name], name
    # A resumed schedule needs it.
    LambdaLR(second, lambda step: 0.25, last_epoch=5)
    assert [group["lr"] for group in second.param_groups] == [0.005, 0.0125]


def test_options_that_were_not_saved_stay():
    optimizer, _ = make(steps=1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in ("optim_bits", "min_8bit_size", "stochastic_rounding"):
            del group[name]
    second, _ = make(stochastic_rounding=True)
    second.load_state_dict(saved)
    assert all(group["stochastic_rounding"] for group in second.param_groups)


def test_codes_of_bitsandbytes_become_ours():
    first, second = randn(67, 71), randn(67, 71, seed=1).square()
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert not has_our_maps({"qmap1": signed, "qmap2": unsigned})
    # Their codes, by hand: the scale of a block, and the nearest value of the map.
    state = {"step": 7}
    for i, moment, qmap in ((1, first, signed), (2, second, unsigned)):
        blocks = moment.flatten().split(256)
        absmax = torch.stack([block.abs().max() for block in blocks])
        scaled = torch.cat([block / scale for block, scale in zip(blocks, absmax)])
        codes = (scaled[:, None] - qmap).abs().argmin(1).to(torch.uint8).view(67, 71)
        state |= {f"state{i}": codes, f"absmax{i}": absmax, f"qmap{i}": qmap}
    theirs = decode(state)
    ours = converted(state, 8)
    assert has_our_maps(ours) and ours["step"] == 7
    for mine, expected, absmax in zip(decode(ours), theirs, (ours["absmax1"], ours["absmax2"])):
        spread = absmax.repeat_interleave(256)[:4757].view(67, 71)
        # Half a step of our codes, which is 1/72 of the largest.
        assert ((mine - expected).abs() <= 0.014 * spread).all()
    full = converted(state, 32)
    assert full.keys() == {"step", "state1", "state2"}
    assert torch.equal(full["state1"], theirs[0]) and torch.equal(full["state2"], theirs[1])


def change(number, **entries):
    """A change of a saved state's entries; `None` removes one."""

    def apply(saved):
        state = saved["state"][number]
        for key, value in entries.items():
            inner = state if key == "step" else state[WRAPPED]
            if value is None:
                del inner[key]
            else:
                inner[key] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["param_groups"].pop(), "1 groups were saved; there are 2"),
        (lambda s: s["param_groups"][0]["params"].pop(), "group 0 has 2 parameters; must be 3"),
        (
            change(3, state1=torch.zeros(9, dtype=torch.uint8)),
            r"parameter 3: state1 is \(9,\); must",
        ),
        (change(1, state2=torch.zeros(9, 12)), r"parameter 1: state2 is \(9, 12\); must have 117"),
        (change(0, absmax1=torch.ones(18)), r"parameter 0: absmax1 is \(18,\); must have 19"),
        (change(0, qmap2=torch.ones(16)), r"qmap2 is \(16,\); must have 256"),
        (change(0, absmax2=None), "absmax2 is None; must have 19"),
        (change(2, state2=None), "parameter 2 has no state2, so it is not a state of AdamW"),
        (change(3, step=None), "parameter 3 has no step"),
        (change(0, state2=torch.zeros(67, 71)), "state2 is torch.float32; must be torch.uint8"),
    ],
)
@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
def test_a_state_that_does_not_fit_changes_nothing(kind, spoil, message):
    saved = copy.deepcopy(make(steps=3)[0].state_dict())
    spoil(saved)
    optimizer, _ = make(kind, steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    same(before, optimizer.state_dict())
    given(optimizer, grads_of(1))


def test_the_state_of_another_optimizer_is_refused():
    optimizer, weights = make()
    peer = torch.optim.AdamW([{"params": weights[:3]}, {"params": weights[3:]}], lr=0.1)
    given(peer, grads_of(0))
    with pytest.raises(
        ValueError, match="parameter 0 has no state1, so it is not a state of AdamW"
    ):
        optimizer.load_state_dict(peer.state_dict())
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("wrong", [{"lr": torch.tensor(1e-3)}, {"betas": (0.9, 1.5)}])
def test_saved_options_out_of_range_change_nothing(wrong):
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = AdamW8bit([weight], lr=0.5)
    found = optimizer.state_dict()
    found["param_groups"][0] |= wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        optimizer.load_state_dict(found)
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["betas"] == (
        0.9,
        0.999,
    )
