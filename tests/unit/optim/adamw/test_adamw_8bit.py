"""AdamW8bit: compared with the naive form, number of bits, small and zero gradients."""

import math

import pytest
import torch
from torch import nn

import reference
from oddsmith.optim import AdamW8bit, optimizer_bytes
from support.gradients import given, randn, train, values, weights_of

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
# A scalar, an empty tensor, one element, a vector, a small matrix, full blocks, and a partial one.
SHAPES = [(), (0, 3), (1,), (77,), (9, 13), (64, 64), (67, 71)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grads_of(step, shapes=SHAPES):
    return [randn(*shape, seed=100 * step + i) + 0.3 for i, shape in enumerate(shapes)]


# ---- Comparison with the naive form ----


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_naive_form(dtype, bits):
    """With 32 bits as near to fp64 as torch's AdamW in that dtype, with 8 bits within the codes."""
    ours, theirs = weights_of(SHAPES, dtype), weights_of(SHAPES, dtype)
    truth = [reference.AdamW(each.detach()) for each in ours]
    optimizer = AdamW8bit(ours, **RULE, optim_bits=bits)
    peer = torch.optim.AdamW(theirs, **RULE)
    for step in range(12):
        grads = [each.to(dtype) for each in grads_of(step)]
        given(optimizer, grads)
        given(peer, grads)
        for naive, grad in zip(truth, grads):
            naive.step(grad, **RULE)
    assert [each.shape for each in ours] == [each.value.shape for each in truth]
    assert {each.dtype for each in ours} == {dtype}
    for part, allowed in ((slice(0, 5), 1e-6), (slice(5, 7), 1e-6 if bits == 32 else 4e-3)):
        errors, peers, moved = (
            torch.cat([(a - b.value).abs().flatten() for a, b in zip(some[part], truth[part])])
            for some in (ours, theirs, weights_of(SHAPES, dtype))
        )
        assert moved.mean() > 0.05
        assert errors.mean() <= peers.mean() * 1.1 + allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_gradients_are_not_rounded(dtype):
    """Gradients can be gathered in fp32; half precision has fewer digits."""
    ours, exact, rounded = (nn.Parameter(randn(67, 71).to(dtype)) for _ in range(3))
    naive = reference.AdamW(exact.detach())
    for each in (ours, exact):
        each.grad_dtype = torch.float32
    optimizer, all_32 = AdamW8bit([ours], **RULE), AdamW8bit([exact], **RULE, optim_bits=32)
    for step in range(4):
        grad = randn(67, 71, seed=50 + step)
        ours.grad = grad.clone()
        exact.grad = grad.clone()
        optimizer.step()
        all_32.step()
        naive.step(grad, **RULE)
    first = (all_32.state[exact]["state1"] - naive.m).abs().max()
    assert first < 1e-6
    if dtype != torch.float32:
        peer = AdamW8bit([rounded], **RULE, optim_bits=32)
        train(peer, rounded, 4, lambda step: randn(67, 71, seed=50 + step).to(dtype))
        assert (peer.state[rounded]["state1"] - naive.m).abs().max() > 100 * first
    torch.testing.assert_close(ours, exact, atol=4e-3, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_parameters(dtype):
    flat = nn.Parameter(randn(128, 65).to(dtype))
    strided = nn.Parameter(randn(128, 65).to(dtype).T.contiguous().T)
    assert not strided.is_contiguous()
    for weight in (flat, strided):
        train(
            AdamW8bit([weight], **RULE), weight, 4, lambda s: randn(128, 65, seed=9 + s).to(dtype)
        )
    assert torch.equal(flat, strided)  # both are updated row by row
    gradient = nn.Parameter(randn(128, 65).to(dtype))
    optimizer = AdamW8bit([gradient], **RULE)
    train(optimizer, gradient, 4, lambda s: randn(128, 65, seed=9 + s).to(dtype).T.contiguous().T)
    assert torch.equal(flat, gradient)


def test_groups_have_options_of_their_own():
    weights = weights_of([(64, 65)] * 3)
    options = [{"lr": 0.1}, {"betas": (0.5, 0.7), "eps": 0.1}, {"weight_decay": 0.7}]
    optimizer = AdamW8bit([{"params": [w], **o} for w, o in zip(weights, options)], **RULE)
    truth = [reference.AdamW(each.detach()) for each in weights]
    for step in range(3):
        grads = grads_of(step, [(64, 65)] * 3)
        given(optimizer, grads)
        for naive, grad, changed in zip(truth, grads, options):
            naive.step(grad, **{**RULE, **changed})
    for weight, naive in zip(weights, truth):
        torch.testing.assert_close(weight.double(), naive.value, atol=0.01, rtol=0)


# ---- Number of bits ----


def test_small_ones_and_those_of_32_bits_are_fp32():
    small, large, table = weights_of([(63, 65), (64, 64), (64, 64)])
    groups = [{"params": [small, large]}, {"params": [table], "optim_bits": 32}]
    optimizer = AdamW8bit(groups)
    given(optimizer, [torch.ones_like(each) for each in (small, large, table)])
    dtypes = [optimizer.state[each]["state1"].dtype for each in (small, large, table)]
    assert dtypes == [torch.float32, torch.uint8, torch.float32]
    assert "absmax1" not in optimizer.state[table]
    placed = AdamW8bit([{"params": [small, large, table], "full_precision": [2]}])
    given(placed, [torch.ones_like(each) for each in (small, large, table)])
    assert [placed.state[each]["state1"].dtype for each in (small, large, table)] == dtypes
    lower = AdamW8bit([small], min_8bit_size=4095)
    given(lower, [torch.ones_like(small)])
    assert lower.state[small]["state2"].dtype == torch.uint8


def test_two_bytes_per_parameter():
    weights = weights_of([(512, 256), (300, 301), (64, 65)])
    optimizer = AdamW8bit(weights)
    given(optimizer, [torch.ones_like(each) for each in weights])
    assert optimizer_bytes(optimizer) <= 2.1 * sum(each.numel() for each in weights)


# ---- Which elements move ----


@pytest.mark.parametrize("bits", [8, 32])
def test_a_zero_gradient_moves_nothing(bits):
    """Not in 300 steps, and not with other gradients in the same block."""
    weight = nn.Parameter(randn(67, 71))
    before = weight.detach().clone()
    still = torch.arange(weight.numel()).view(67, 71) % 5 > 0
    still[:8] = True  # two full blocks
    optimizer = AdamW8bit([weight], lr=1e-2, eps=1e-7, weight_decay=0.0, optim_bits=bits)
    train(optimizer, weight, 300, lambda s: randn(67, 71, seed=s).masked_fill(still, 0.0))
    assert torch.equal(weight[still], before[still])
    assert (weight != before)[~still].all()


def test_small_gradients_move_as_far():
    """Within a block, gradients from 1 to 1e-5: Adam moves all equally, also with 8 bits."""
    sizes = 10.0 ** -(torch.arange(64 * 129).view(64, 129) % 6)
    ours, full = nn.Parameter(torch.zeros(64, 129)), nn.Parameter(torch.zeros(64, 129))
    options = {"lr": 1e-3, "eps": 1e-12, "weight_decay": 0.0}
    for weight, bits in ((ours, 8), (full, 32)):
        optimizer = AdamW8bit([weight], **options, optim_bits=bits)
        train(optimizer, weight, 100, lambda s: sizes * (1.0 + 0.3 * randn(64, 129, seed=s)))
    moved = (ours / full).detach()
    for size in range(6):
        assert 0.85 < moved[sizes == 10.0**-size].mean() < 1.15, size
    assert moved.min() > 0.4 and moved.max() < 2.0


def test_stochastic_rounding_keeps_the_mean():
    """Steps of a thirtieth of the spacing of bf16 at 1: rounding to nearest would change
    nothing."""
    lr, steps = 2.0**-8 / 30, 60
    finals = {}
    for stochastic in (False, True):
        weight = nn.Parameter(torch.ones(64, 65).bfloat16())
        optimizer = AdamW8bit([weight], lr=lr, weight_decay=0.0, stochastic_rounding=stochastic)
        train(optimizer, weight, steps, lambda s: torch.full((64, 65), 0.3).bfloat16())
        finals[stochastic] = weight.detach().double()
    assert (finals[False] == 1.0).all()
    moved = 1.0 - finals[True].mean()
    assert moved == pytest.approx(lr * steps, rel=0.05)
    assert len(finals[True].unique()) > 2


def test_stochastic_rounding_depends_on_the_seed_and_the_step():
    def run(seed, steps=1, dtype=torch.bfloat16):
        weights = [nn.Parameter(torch.ones(64, 65).to(dtype)) for _ in range(2)]
        optimizer = AdamW8bit(
            weights, lr=1e-3, weight_decay=0.0, stochastic_rounding=True, seed=seed
        )
        before = []
        for _ in range(steps):
            before = values(weights)
            given(optimizer, [torch.ones(64, 65)] * 2)
        changed = [(w != b).detach() for w, b in zip(weights, before)]
        return [*values(weights), *changed]

    assert all(map(torch.equal, run(3, 2), run(3, 2)))
    assert not torch.equal(run(3)[0], run(4)[0])  # another seed
    assert not torch.equal(run(3)[0], run(3)[1])  # another parameter
    assert not torch.equal(run(3)[2], run(3, 2)[2])  # another step
    # Only bf16 is rounded stochastically.
    assert len(run(3, dtype=torch.float16)[0].unique()) == 1


@pytest.mark.parametrize("bits", [8, 32])
def test_elements_that_are_not_finite_are_kept_and_counted(bits, caplog):
    weight = nn.Parameter(randn(67, 71))
    optimizer = AdamW8bit([weight], **RULE, optim_bits=bits)
    train(optimizer, weight, 2, lambda s: randn(67, 71, seed=s))
    bad = torch.zeros(67, 71, dtype=torch.bool)
    bad.view(-1)[[0, 300, 4756]] = True
    for again in range(2):
        before = weight.detach().clone()
        grad = randn(67, 71, seed=5 + again)
        grad[bad] = torch.tensor([math.nan, math.inf, -math.inf])
        weight.grad = grad
        optimizer.step()
        assert torch.equal(weight == before, bad)
    assert weight.isfinite().all() and optimizer.nonfinite == 6
    assert caplog.text.count("3 element(s) of the gradients were NaN or infinite") == 1
    assert caplog.text.count("NaN") == 1
    # They continue from moments of zero.
    train(optimizer, weight, 1, lambda s: torch.ones(67, 71))
    assert (weight != before).all() and optimizer.nonfinite == 6
