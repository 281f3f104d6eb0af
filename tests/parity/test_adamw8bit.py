"""AdamW8bit and bitsandbytes 0.50 on the CPU: codes, distance from fp32, switching between them."""

import copy
import io

import pytest
import torch
from torch import nn

from oddsmith.demo.model import build_model, train_tokenizer
from oddsmith.demo.tasks import make_pairs
from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from oddsmith.optim.adamw.moments import decode
from oddsmith.optim.adamw.saved_state import unwrap
from support.bitsandbytes_rounding import SteppedAdamW
from support.gradients import given, randn, weights_of

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

RULE = {"lr": 0.01, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.1}
# 8 bits with a partial block, 32 bits, 8 bits in full blocks.
SHAPES = [(67, 71), (9, 13), (64, 64)]
STEPS = 25


def grads_of(step):
    """Gradients over two decades: a constant part, and noise."""
    sizes = [10 ** (0.4 * randn(*shape, seed=50 + i)) for i, shape in enumerate(SHAPES)]
    return [
        size
        * (0.5 * randn(*size.shape, seed=70 + i) + randn(*size.shape, seed=100 * (step + 1) + i))
        for i, size in enumerate(sizes)
    ]


def through_a_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def distance(some, others):
    return torch.stack([(a - b).detach().norm() for a, b in zip(some, others)]).norm().item()


# ---- Its codes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_codes_are_those_of_the_table(dtype):
    """What AdamW8bit differs in from theirs is written down in a few lines, which do what theirs does."""
    ours, theirs = weights_of(SHAPES, dtype), weights_of(SHAPES, dtype)
    # Those of at least 4,096 elements; the other has moments of 32 bits.
    copies = {i: SteppedAdamW(ours[i].data, **RULE) for i in (0, 2)}
    peer = bnb.optim.AdamW8bit(theirs, **RULE)
    for step in range(STEPS):
        grads = grads_of(step)
        for i, each in copies.items():
            each.step(grads[i].to(dtype))
        given(peer, grads)
    for i, each in copies.items():
        state, expected = each.state, peer.state[theirs[i]]
        assert state["step"] == expected["step"] == STEPS
        assert state["state1"].dtype == expected["state1"].dtype
        for key in ("qmap1", "qmap2"):
            torch.testing.assert_close(state[key], expected[key], atol=1e-7, rtol=0)
        for key in ("absmax1", "absmax2"):
            torch.testing.assert_close(state[key], expected[key], atol=0, rtol=1e-4)
        for key in ("state1", "state2"):
            apart = (state[key].int() - expected[key].int()).abs()
            # A moment on the boundary of two codes can get either.
            assert (apart > 0).sum() <= 1e-3 * apart.numel(), key
        moved = (ours[i] - theirs[i]).abs() > 1e-6 + 2 * torch.finfo(dtype).eps * theirs[i].abs()
        assert moved.sum() <= 1e-3 * moved.numel()


def test_small_tensors_have_their_moments():
    ours, theirs = weights_of(SHAPES[1:2]), weights_of(SHAPES[1:2])
    optimizer, peer = AdamW8bit(ours, **RULE), bnb.optim.AdamW8bit(theirs, **RULE)
    for step in range(STEPS):
        grads = grads_of(step)[1:2]
        given(optimizer, grads)
        given(peer, grads)
    state, expected = optimizer.state[ours[0]], peer.state[theirs[0]]
    torch.testing.assert_close(state["state1"], expected["state1"], atol=1e-6, rtol=1e-5)
    # The decay comes after the update here, and before it there: a thousandth of a step.
    torch.testing.assert_close(ours[0], theirs[0], atol=STEPS * 2e-5, rtol=1e-6)


# ---- Distance from fp32 ----


@pytest.fixture(scope="module")
def lesson():
    """A small model and its batches; the embeddings, which have 32 bits in both, are frozen."""
    rows = make_pairs(80, seed=4)
    texts = [row["prompt"][0]["content"] + row["chosen"][0]["content"] for row in rows]
    tokenizer = train_tokenizer(texts)
    tokenizer.padding_side = "right"
    torch.manual_seed(5)
    model = build_model(tokenizer, hidden_size=64, num_hidden_layers=1)
    model.get_input_embeddings().requires_grad_(False)
    batches = []
    for start in range(0, 80, 4):
        batch = tokenizer(texts[start : start + 4], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append({"input_ids": batch["input_ids"], "labels": labels})
    return model, batches


def test_300_steps_end_closer_to_fp32_than_those_of_bitsandbytes(lesson):
    """All get the gradients of the fp32 run, so that only the 8-bit moments differ."""
    model, batches = copy.deepcopy(lesson[0]), lesson[1]
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}
    full = [each for each in model.parameters() if each.requires_grad]
    start = [each.detach().clone() for each in full]
    runs = {
        kind: [nn.Parameter(each.clone()) for each in start]
        for kind in (AdamW8bit, bnb.optim.AdamW8bit)
    }
    optimizers = [kind(weights, **options) for kind, weights in runs.items()]
    reference = torch.optim.AdamW(full, **options)
    losses = []
    for step in range(300):
        loss = model(**batches[step % len(batches)]).loss
        reference.zero_grad()
        loss.backward()
        grads = [each.grad for each in full]
        for optimizer in optimizers:
            given(optimizer, grads)
        reference.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]  # it has learnt something
    ours, theirs = (distance(weights, full) for weights in runs.values())
    assert ours < 0.9 * theirs, (ours, theirs)
    assert ours < 0.1 * distance(start, full)


def test_a_zero_gradient_moves_what_bitsandbytes_has_and_not_ours():
    moved = {}
    for kind in (AdamW8bit, bnb.optim.AdamW8bit):
        weight = nn.Parameter(randn(64, 64))
        optimizer = kind([weight], lr=1e-3, weight_decay=0.0)
        for step in range(30):
            grad = randn(64, 64, seed=step)
            grad[:, ::2] = 0.0
            given(optimizer, [grad])
        moved[kind] = (weight.detach() - randn(64, 64))[:, ::2].abs().max().item()
    assert moved[AdamW8bit] == 0.0
    assert moved[bnb.optim.AdamW8bit] > 0.0


# ---- Switching ----


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit, PagedAdamW32bit])
def test_a_run_switches_from_bitsandbytes(kind):
    theirs = weights_of(SHAPES)
    peer = bnb.optim.AdamW8bit(theirs, **RULE)
    for step in range(10):
        given(peer, grads_of(step))
    saved = through_a_file(peer)
    ours = [nn.Parameter(each.detach().clone()) for each in theirs]
    optimizer = kind(ours, lr=0.5)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in RULE} == RULE and "alpha" not in group
    for mine, other in zip(ours, theirs):
        state, expected = optimizer.state[mine], peer.state[other]
        assert state["step"] == 10 and type(state["step"]) is int
        for moment, before in zip(decode(state), decode(expected)):
            exact = state["state1"].dtype == torch.float32
            torch.testing.assert_close(
                moment, before, rtol=0, atol=0 if exact else 0.014 * before.abs().max().item()
            )
    before = [each.detach().clone() for each in theirs]
    for step in range(10, 20):
        given(peer, grads_of(step))
        given(optimizer, grads_of(step))
    assert distance(ours, theirs) < 0.1 * distance(before, theirs)


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
def test_a_run_switches_to_bitsandbytes(kind):
    ours = weights_of(SHAPES)
    optimizer = kind(ours, **RULE)
    for step in range(10):
        given(optimizer, grads_of(step))
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]
    peer = bnb.optim.AdamW8bit(theirs, lr=0.5)
    peer.load_state_dict(through_a_file(optimizer))
    for mine, other in zip(ours, theirs):
        state, expected = unwrap(optimizer.state[mine]), peer.state[other]
        assert expected["step"] == 10
        assert all(torch.equal(state[key], expected[key]) for key in state.keys() - {"step"})
    assert {key: peer.param_groups[0][key] for key in RULE} == RULE
    before = [each.detach().clone() for each in ours]
    for step in range(10, 20):
        given(peer, grads_of(step))
        given(optimizer, grads_of(step))
    assert distance(ours, theirs) < 0.1 * distance(before, ours)


def test_a_run_of_32_bits_switches_both_ways():
    theirs, ours = weights_of(SHAPES), weights_of(SHAPES)
    peer, optimizer = bnb.optim.AdamW32bit(theirs, **RULE), PagedAdamW32bit(ours, **RULE)
    for step in range(4):
        given(peer, grads_of(step))
        given(optimizer, grads_of(step))
    saved, others = through_a_file(peer), through_a_file(optimizer)
    peer.load_state_dict(others)
    optimizer.load_state_dict(saved)
    for step in range(4, 8):
        given(peer, grads_of(step))
        given(optimizer, grads_of(step))
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)
