"""The variable-length kernel over a packed row: its arguments, and on a GPU its results."""

import sys
from types import ModuleType

import pytest
import torch

from oddsmith.packing import attention_cuda
from oddsmith.packing.pattern import Pattern
from support.packed_attention import SEGMENTS, TOLERANCE, attention, tensors


def naive_varlen(query, key, value, plan, scale, window, softcap):
    """The definition of a variable-length kernel: block by block, causal at the lower right."""
    out, groups = [], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    bounds = zip(plan.query_bounds, plan.query_bounds[1:], plan.key_bounds, plan.key_bounds[1:])
    for first, end, first_key, end_key in bounds:
        assert end - first <= plan.longest_query and end_key - first_key <= plan.longest_key
        q, k, v = query[first:end], key[first_key:end_key], value[first_key:end_key]
        scores = torch.einsum("qhd,khd->hqk", q, k).double() * scale
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = (distance >= 0) & (distance < (window or len(k)))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v.double()).to(q.dtype))
    return torch.cat(out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_on_a_gpu(window):
    segments = ((40, 30, 20), (0, 20, 50), (30, 0, 10), (20, 40, 0))
    count = sum(map(sum, segments))
    torch.manual_seed(5)
    inputs = [
        torch.randn(1, heads, count, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    assert attention_cuda.can_run(inputs[0], Pattern(window), None, None, 0.0)
    out = attention_cuda.packed_varlen(*inputs, segments, None, window)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    truth = attention(*exact, segments, None, window)
    upstream = torch.randn(truth.shape, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, upstream.to(out))
    true_grads = torch.autograd.grad(truth, exact, upstream)
    for mine, true in zip((out, *grads), (truth, *true_grads), strict=True):
        torch.testing.assert_close(mine.double().cpu(), true, rtol=3e-2, atol=3e-2)


NAIVE = attention_cuda._Kernel("naive", naive_varlen, knows_softcap=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_what_the_kernel_is_given_makes_the_definition(dtype, window, softcap, monkeypatch):
    # The kernel needs a GPU; its arguments can be checked without one.
    monkeypatch.setattr(attention_cuda, "_kernel", lambda: NAIVE)
    q, k, v = tensors(SEGMENTS, dtype)
    out = attention_cuda.packed_varlen(q, k, v, SEGMENTS, 0.6, window, softcap)
    truth = attention(q, k, v, SEGMENTS, 0.6, window, None, softcap)
    torch.testing.assert_close(out.double(), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_plan_by_hand():
    plan = attention_cuda._plan(((2, 1, 3), (0, 2, 0)), torch.device("cpu"))
    # Three blocks: prompt and chosen 0..3, rejected 3..6 with the prompt 0..2, and 6..8.
    assert plan.query_bounds.tolist() == [0, 3, 6, 8]
    assert plan.key_bounds.tolist() == [0, 3, 8, 10]
    assert plan.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert (plan.longest_query, plan.longest_key) == (3, 5)
    assert plan.query_bounds.dtype == plan.key_bounds.dtype == torch.int32
    # No prompt is shared: keys are not moved.
    assert attention_cuda._plan(((0, 2, 3),), torch.device("cpu")).keys is None


class OnGpu:
    """The attributes of a query that `can_run` reads."""

    def __init__(self, width=64, dtype=torch.bfloat16, kind="cuda"):
        self.shape, self.dtype, self.device = (1, 4, 9, width), dtype, torch.device(kind)


@pytest.mark.parametrize(
    ("query", "changes", "runs"),
    [
        (OnGpu(), {}, True),
        (OnGpu(256, torch.float16), {}, True),
        (OnGpu(), {"pattern": Pattern(window=3)}, True),
        (OnGpu(), {"softcap": 2.0}, True),
        (OnGpu(257), {}, False),
        (OnGpu(dtype=torch.float32), {}, False),
        (OnGpu(kind="cpu"), {}, False),
        (OnGpu(), {"dropout": 0.1}, False),
        (OnGpu(), {"sinks": torch.ones(4)}, False),
        (OnGpu(), {"pattern": Pattern(chunk=3)}, False),
    ],
)
def test_which_calls_the_kernels_take(query, changes, runs, monkeypatch):
    call = {"pattern": Pattern(), "softcap": None, "sinks": None, "dropout": 0.0, **changes}
    monkeypatch.setattr(attention_cuda, "_kernel", lambda: NAIVE)
    assert attention_cuda.can_run(query, **call) is runs
    monkeypatch.setattr(attention_cuda, "_kernel", lambda: None)
    assert attention_cuda.can_run(query, **call) is False


def test_a_kernel_without_softcap_takes_no_softcap(monkeypatch):
    monkeypatch.setattr(attention_cuda, "_kernel", attention_cuda._of_torch)
    assert attention_cuda.can_run(OnGpu(), Pattern(), None, None, 0.0)
    assert not attention_cuda.can_run(OnGpu(), Pattern(), 2.0, None, 0.0)


def test_what_is_installed_decides(monkeypatch):
    kernel = attention_cuda._kernel.__wrapped__
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert kernel().knows_softcap is False  # libtorch's

    def newest(q, k, v, softcap=0.0, **kwargs):
        raise AssertionError

    def older(q, k, v, cu_seqlens_q, cu_seqlens_k, **kwargs):
        assert kwargs == {
            "max_seqlen_q": 2,
            "max_seqlen_k": 2,
            "softmax_scale": 0.5,
            "causal": True,
            "window_size": (2, 0),
        }
        return q, "log-sum-exp"

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = older
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    found = kernel()
    assert found.knows_softcap is False
    q = torch.ones(3, 1, 8)
    plan = attention_cuda._plan(((0, 1, 2),), torch.device("cpu"))
    assert found.run(q, q, q, plan, 0.5, 3, None) is q
    newer = ModuleType("flash_attn_interface")
    newer.flash_attn_varlen_func = newest
    monkeypatch.setitem(sys.modules, "flash_attn_interface", newer)
    assert kernel().knows_softcap is True
