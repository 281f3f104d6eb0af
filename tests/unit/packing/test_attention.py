"""Which implementation computes a call, and that all agree with the definition."""

import pytest
import torch

from oddsmith.packing import attention as module
from oddsmith.packing.attention import packed_attention
from oddsmith.packing.pattern import CAUSAL, Pattern
from support import flash_stand_in
from support.packed_attention import SEGMENTS, attention, tensors

# The longest sequence of SEGMENTS has seven tokens.
FAR = Pattern(window=7, chunk=7)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.fixture
def used(monkeypatch):
    """The names of the implementations that were called."""
    names = []
    for name in ("PackedFlash", "PackedTiles"):
        apply = getattr(module, name).apply
        spy = lambda *args, apply=apply, name=name: (names.append(name), apply(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, name, type(name, (), {"apply": staticmethod(spy)}))
    for name in ("packed_varlen", "packed_blocks"):
        call = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, call=call, name=name: (names.append(name), call(*args))[1]
        )
    return names


@pytest.mark.parametrize("value_width", [5, 8, 11])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "PackedFlash"),
        ({"pattern": FAR}, "PackedFlash"),
        ({"pattern": Pattern(window=3)}, "PackedFlash"),
        ({"pattern": Pattern(chunk=3)}, "PackedFlash"),
        ({"sinks": SINKS}, "PackedFlash"),
        ({"pattern": Pattern(window=3), "sinks": SINKS}, "PackedFlash"),
        ({"softcap": 2.0}, "PackedTiles"),
        ({"pattern": Pattern(window=3, chunk=4)}, "PackedTiles"),
    ],
)
def test_the_choice_on_a_cpu(options, name, value_width, used):
    q, k, v = tensors(SEGMENTS, torch.float32, value_width)
    out = packed_attention(q, k, v, SEGMENTS, **options)
    assert used == [name]
    pattern = options.get("pattern", CAUSAL)
    extra = (options.get("softcap"), options.get("sinks"))
    truth = attention(q, k, v, SEGMENTS, None, pattern.window, pattern.chunk, *extra)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value_width", [5, 11])
def test_gradients_of_values_of_another_width(value_width, used):
    inputs = [x.requires_grad_() for x in tensors(SEGMENTS, torch.float64, value_width)]
    exact = [x.detach().requires_grad_() for x in inputs]
    upstream = torch.randn(1, 4, sum(map(sum, SEGMENTS)), value_width, dtype=torch.float64)
    out, truth = packed_attention(*inputs, SEGMENTS), attention(*exact, SEGMENTS)
    grads = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(truth, exact, upstream))
    assert used == ["PackedFlash"]


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "packed_blocks"), ({"softcap": 2.0}, "PackedTiles"), ({"sinks": SINKS}, "PackedTiles")],
)
def test_the_choice_with_dropout(options, name, used):
    packed_attention(*tensors(SEGMENTS, torch.float32), SEGMENTS, dropout=0.5, **options)
    assert used == [name]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "packed_varlen"),
        ({"pattern": Pattern(window=3)}, "packed_varlen"),
        ({"softcap": 2.0}, "packed_varlen"),
        ({"pattern": Pattern(chunk=3)}, "PackedFlash"),
        ({"pattern": Pattern(chunk=7)}, "packed_varlen"),
        ({"sinks": SINKS}, "PackedFlash"),
    ],
)
@pytest.mark.parametrize("value_width", [5, 8])
def test_the_choice_with_a_package(options, name, value_width, used, monkeypatch):
    flash_stand_in.install(monkeypatch)
    q, k, v = tensors(SEGMENTS, torch.bfloat16, value_width)
    out = packed_attention(q, k, v, SEGMENTS, scale=0.6, **options)
    assert used == [name] and out.shape == (1, 4, q.shape[2], value_width)
    pattern = options.get("pattern", CAUSAL)
    extra = (options.get("softcap"), options.get("sinks"))
    truth = attention(q, k, v, SEGMENTS, 0.6, pattern.window, pattern.chunk, *extra)
    torch.testing.assert_close(out.double(), truth, rtol=2e-2, atol=2e-2)
