"""The product with a 4-bit weight: values, gradients, and errors."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import reference
from oddsmith import functional
from oddsmith.quant.linear import linear_nf4_lora

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens: none; few, multiplied directly with the codes; more, an odd number.
TOKENS = [0, 1, 2, 3, 4, 5, 16, 17, 131]
# Rows and columns: full blocks, full vectors, neither.
SIZES = [(64, 128), (37, 192), (19, 96), (23, 67), (1, 64), (48, 1), (33, 320)]


@pytest.fixture(params=[False, True], ids=["slices", "tensor_ops"])
def path(request, tensor_ops_switch):
    tensor_ops_switch(request.param)
    return request.param


def problem(tokens, rows, columns, dtype=torch.float32, double_quant=True, weight_dtype=None):
    generator = torch.Generator().manual_seed(13)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    weight = (normal(rows, columns) * 0.3).to(weight_dtype or dtype)
    packed, state = functional.quantize_nf4(weight, double_quant=double_quant)
    x = normal(tokens, columns).to(dtype).requires_grad_()
    bias = normal(rows).to(dtype).requires_grad_()
    return x, packed, state, bias, normal(tokens, rows).to(dtype)


def naive(x, packed, state, bias, upstream):
    """Output and gradients from the full weight, all in the dtype of `x`."""
    weight = reference.unpacked(packed, state).to(x.dtype)
    out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    inputs = [tensor for tensor in (x, bias) if tensor is not None]
    return out, *torch.autograd.grad(out, inputs, upstream)


def true(x, packed, state, bias, upstream):
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, bias)]
    return naive(wide[0], packed, state, wide[1], upstream.double())


def ours(x, packed, state, bias, upstream):
    out = functional.linear_nf4(x, packed, state, bias)
    inputs = [tensor for tensor in (x, bias) if tensor is not None]
    return out, *torch.autograd.grad(out, inputs, upstream)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["scales", "nested"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_equal_the_truth(path, size, double_quant, with_bias):
    for tokens in TOKENS:
        x, packed, state, bias, upstream = problem(tokens, *size, double_quant=double_quant)
        case = x, packed, state, bias if with_bias else None, upstream
        for mine, truth in zip(ours(*case), true(*case), strict=True):
            assert mine.dtype == torch.float32 and mine.shape == truth.shape
            # Sums of up to 320 products of size one.
            torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [2, 131])
def test_the_output_can_be_changed_in_place(path, tokens, dtype, with_bias):
    # Several adapters add to the output of a layer in place, which autograd forbids for views.
    x, packed, state, bias, _ = problem(2 * tokens, 64, 128, dtype=dtype)
    x = x.detach().view(2, tokens, 128).requires_grad_()
    bias = bias if with_bias else None
    expected = functional.linear_nf4(x, packed, state, bias) + 1.0
    lora_a, lora_b = torch.zeros(2, 128, dtype=dtype), torch.zeros(64, 2, dtype=dtype)
    lora_a.requires_grad_()
    for out in (
        functional.linear_nf4(x, packed, state, bias),
        linear_nf4_lora(x, packed, state, lora_a, lora_b, 1.0, bias),
    ):
        out += 1.0
        assert torch.equal(out, expected)
        (found,) = torch.autograd.grad(out.square().sum(), x)
        assert found.shape == x.shape and found.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 17, 131])
@pytest.mark.parametrize("size", [(64, 128), (37, 192), (23, 67)], ids=str)
def test_as_accurate_as_the_naive_form(path, size, tokens, dtype):
    case = problem(tokens, *size, dtype)
    results = zip(ours(*case), naive(*case), true(*case), strict=True)
    for mine, simple, truth in results:
        assert mine.dtype == dtype
        scale = truth.abs().max()
        error, naive_error = ((y.double() - truth).abs().max() / scale for y in (mine, simple))
        assert error <= naive_error + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_dtypes_of_tokens_weight_and_bias_may_differ(path, dtype, weight_dtype):
    for tokens in (2, 40):
        x, packed, state, bias, upstream = problem(tokens, 64, 128, dtype, True, weight_dtype)
        bias = bias.detach().float().requires_grad_()
        case = x, packed, state, bias, upstream
        for mine, truth, like in zip(ours(*case), true(*case), (x, x, bias), strict=True):
            assert mine.dtype == like.dtype
            error = (mine.double() - truth).abs().max() / truth.abs().max()
            assert error <= 4 * max(torch.finfo(d).eps for d in (dtype, weight_dtype)) + 1e-6


def test_the_gradient_is_that_of_a_linear_function(path):
    """f(x + d) - f(x) = <gradient, d> for a step of any size, no limit needed."""
    x, packed, state, bias, upstream = problem(9, 40, 192)
    _, d_x, d_bias = ours(x, packed, state, bias, upstream)
    step, bias_step = torch.randn_like(x), torch.randn_like(bias)

    def value(x, bias):
        out = functional.linear_nf4(x, packed, state, bias)
        return (out.double() * upstream.double()).sum()

    with torch.no_grad():
        change = value(x + step, bias + bias_step) - value(x, bias)
    expected = (d_x.double() * step.double()).sum() + (d_bias.double() * bias_step.double()).sum()
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-3)


def test_gradients_only_where_they_are_wanted():
    x, packed, state, bias, _ = problem(3, 64, 128)
    frozen = functional.linear_nf4(x.detach(), packed, state, bias.detach())
    assert not frozen.requires_grad
    functional.linear_nf4(x.detach(), packed, state, bias).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((64,), 3.0))
    functional.linear_nf4(x, packed, state, bias.detach()).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not functional.linear_nf4(x, packed, state, bias).requires_grad
    out = functional.linear_nf4(x, packed, state)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        grad.sum().backward()


def test_tokens_may_have_any_shape(path):
    x, packed, state, bias, _ = problem(24, 64, 128)
    flat = functional.linear_nf4(x, packed, state, bias)
    shaped = functional.linear_nf4(x.view(2, 3, 4, 128), packed, state, bias)
    torch.testing.assert_close(shaped.view(24, 64), flat)
    one = functional.linear_nf4(x[5], packed, state, bias)
    assert one.shape == (64,)
    torch.testing.assert_close(one, flat[5], rtol=1e-5, atol=1e-5)
    wide = torch.randn(24, 256)[:, ::2]
    turned = torch.randn(128, 24).t()
    for strided in (wide, turned, torch.randn(1, 128).expand(24, 128)):
        torch.testing.assert_close(
            functional.linear_nf4(strided, packed, state, bias),
            functional.linear_nf4(strided.contiguous(), packed, state, bias),
        )
    x = torch.randn(24, 128, requires_grad=True)
    out = functional.linear_nf4(x, packed, state)
    upstream = torch.randn(64, 24).t()
    (strided,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
    (whole,) = torch.autograd.grad(out, x, upstream.contiguous())
    assert torch.equal(strided, whole)


def test_a_token_alone_gets_the_same_result_as_among_others():
    """Decoding multiplies directly with the codes, the prompt uses tiles."""
    x, packed, state, bias, _ = problem(40, 96, 256)
    together = functional.linear_nf4(x, packed, state, bias)
    for few in (1, 2, 5, 16):
        alone = torch.cat([functional.linear_nf4(p, packed, state, bias) for p in x.split(few)])
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_many_tiles_give_one_result():
    """Wide and tall enough for several tiles of the weight in both directions."""
    x, packed, state, _, upstream = problem(33, 3000, 3200)
    out, d_x = ours(x, packed, state, None, upstream)
    weight = functional.dequantize_nf4(packed, state)
    torch.testing.assert_close(out, x @ weight.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(d_x, upstream @ weight, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_never_a_full_weight():
    rows, columns = 8192, 8192  # 256 MiB in float32
    packed = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(rows * columns // 64)
    state = functional.QuantState(
        absmax, torch.Size([rows, columns]), blocksize=64, quant_type="nf4", dtype=torch.float32
    )

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    x = torch.randn(20, columns, requires_grad=True)
    functional.linear_nf4(x[:, :], packed, state).sum().backward()  # workspaces of libtorch
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    functional.linear_nf4(x, packed, state).sum().backward()
    assert status("VmHWM") - before < 64 << 20


class TestArguments:
    def test_what_does_not_fit_is_refused(self, path):
        x, packed, state, bias, _ = problem(3, 64, 128)
        linear = functional.linear_nf4
        with pytest.raises(ValueError, match=r"x has shape \[3, 127\]; must be \(.., 128\)"):
            linear(x[:, 1:], packed, state)
        with pytest.raises(ValueError, match=r"x has shape \[\]"):
            linear(x[0, 0], packed, state)
        with pytest.raises(TypeError, match="x has dtype float64; must be float32"):
            linear(x.double(), packed, state)
        with pytest.raises(TypeError, match="x has dtype int64"):
            linear(torch.ones(3, 128, dtype=torch.int64), packed, state)
        with pytest.raises(ValueError, match=r"bias has shape \[63\]; must be \(64,\)"):
            linear(x, packed, state, bias[1:])
        with pytest.raises(TypeError, match="bias has dtype int64"):
            linear(x, packed, state, torch.ones(64, dtype=torch.int64))
        with pytest.raises(ValueError, match="packed has shape"):
            linear(x, packed[1:], state)
        for name in ("packed", "bias"):
            arguments = {"packed": packed, "bias": bias}
            arguments[name] = arguments[name].to("meta")
            with pytest.raises(ValueError, match=f"{name} is on meta; must be on the device of x"):
                linear(x, state=state, **arguments)
        vector, vector_state = functional.quantize_nf4(torch.ones(64))
        with pytest.raises(ValueError, match=r"has shape \(64,\); must be a matrix"):
            linear(x, vector, vector_state)


class TestOperators:
    @pytest.mark.parametrize("tokens", [2, 40])
    def test_the_operators_keep_torch_s_rules(self, tokens):
        from oddsmith.quant.linear import _linear_nf4, _linear_nf4_input_gradient
        from oddsmith.quant.nf4 import scale_arguments

        checks = ("test_schema", "test_faketensor")
        x, packed, state, bias, upstream = problem(tokens, 23, 67, torch.bfloat16)
        weight = packed, *scale_arguments(state), 64, 23, 67
        arguments = x.detach(), bias.detach(), *weight
        torch.library.opcheck(_linear_nf4, arguments, test_utils=checks)
        arguments = upstream, *weight, torch.float32
        torch.library.opcheck(_linear_nf4_input_gradient, arguments, test_utils=checks)
