"""Moments of 8 bits: their maps and the nearest codes."""

import pytest
import torch

import reference
from oddsmith.optim.adamw.moments import BLOCKSIZE, blocks_of, decode, encode, layout, maps
from support.gradients import randn

CPU = torch.device("cpu")
# One element; a block minus one; full blocks; a block plus one; many and a part.
SHAPES = [(1,), (255,), (2, 256), (257,), (31, 53)]


def moments(shape, seed=0):
    """First and second moments over many decades, with signs and zeros."""
    sizes = 10.0 ** (3 * randn(*shape, seed=seed + 1))
    first, second = (
        randn(*shape, seed=seed) * sizes,
        (randn(*shape, seed=seed + 2) * sizes).square(),
    )
    first.view(-1)[::7], second.view(-1)[::11] = 0.0, 0.0
    return first, second


def test_maps_ascend_and_have_zero_and_one():
    signed, squares = maps(CPU)
    for each in (signed, squares):
        assert each.shape == (256,) and each.dtype == torch.float32
        assert (each.diff() > 0).all()
        assert each[255] == 1.0
    assert signed[128] == 0.0 and squares[0] == 0.0
    assert torch.equal(signed[129:], -signed[1:128].flip(0))
    # The smallest relative to the largest: 8^-7 for a first moment, 8^-8 for a root.
    assert 3e-7 < signed[129] < 5e-7 and 3e-8 < squares[1].sqrt() < 6.1e-8
    assert maps(CPU)[0] is signed  # shared, not copied


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest(shape):
    first, second = moments(shape)
    state = encode(first, second)
    absmax = {1: first, 2: second.sqrt()}
    found = {1: state["qmap1"].double(), 2: state["qmap2"].double().sqrt()}
    for i, values in absmax.items():
        codes, scales = reference.quantize_blockwise(values, found[i], BLOCKSIZE)
        torch.testing.assert_close(state[f"absmax{i}"] ** (1 / i), scales)
        spread = scales.double().repeat_interleave(BLOCKSIZE)[: values.numel()].view(shape)
        errors = [(found[i][c.long()] * spread - values).abs() for c in (codes, state[f"state{i}"])]
        # Two codes may be equally near up to rounding; nothing else may differ.
        assert (errors[1] <= errors[0] + 1e-6 * spread).all()
        assert (codes != state[f"state{i}"]).float().mean() < 2e-3 or values.numel() < 300


@pytest.mark.parametrize("shape", SHAPES)
def test_decoded_moments_are_encoded_to_the_same_codes(shape):
    state = encode(*moments(shape, seed=5))
    first, second = decode(state)
    assert first.shape == second.shape == shape and first.dtype == torch.float32
    again = encode(first, second)
    assert state.keys() == again.keys()
    for key, value in state.items():
        assert torch.equal(value, again[key]), key


def test_blocks_are_independent():
    """257 elements, the last a million times the others, in another block."""
    first, second = moments((257,))
    first[256], second[256] = -1e6, 1e12
    state = encode(first, second)
    assert state["absmax1"].tolist() == [first[:256].abs().max(), 1e6]
    assert state["state1"][256] == 1 and state["state2"][256] == 255  # -1 and 1
    for key in ("state1", "state2"):
        assert torch.equal(state[key][:256], encode(first[:256], second[:256])[key])


def test_zeros_are_zeros():
    state = encode(torch.zeros(3, 100), torch.zeros(3, 100))
    assert (state["state1"] == 128).all() and (state["state2"] == 0).all()
    assert all((each == 0).all() for each in decode(state))
    # So is the initial state of an optimiser with any codes, because its scales are zero.
    fresh = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in
             layout(torch.Size((3, 100)), 8).items()}  # fmt: skip
    fresh |= dict(zip(("qmap1", "qmap2"), maps(CPU)))
    assert all((each == 0).all() for each in decode(fresh))


def test_layouts():
    assert [blocks_of(n) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    eight = layout(torch.Size((3, 100)), 8)
    assert eight["state1"] == eight["state2"] == ((3, 100), torch.uint8)
    assert eight["absmax1"] == eight["absmax2"] == ((2,), torch.float32)
    assert layout(torch.Size(()), 32) == dict.fromkeys(("state1", "state2"), ((), torch.float32))
