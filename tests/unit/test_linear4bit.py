"""The 4-bit linear layer: values, gradients, and everything that happens to a module."""

import copy
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import reference
from oddsmith import functional
from oddsmith.nn import Linear4bit, Params4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens: none; straight from the codes; more than that, an odd number of them.
TOKENS = [0, 1, 2, 3, 4, 5, 16, 17, 131]
# Rows and columns: whole blocks, whole vectors, neither.
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
    """Output and gradients from a weight in full, all in the dtype of `x`."""
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 17, 131])
@pytest.mark.parametrize("size", [(64, 128), (37, 192), (23, 67)], ids=str)
def test_no_further_from_the_truth_than_the_naive_form(path, size, tokens, dtype):
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


def test_a_token_by_itself_gets_what_it_gets_among_others():
    """Decoding goes straight from the codes, the prompt through tiles."""
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
def test_the_weight_is_never_there_in_full():
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

    @pytest.mark.parametrize("quant_type", ["fp4", "int8", "af4"])
    def test_other_types_are_refused_by_name(self, quant_type):
        message = f"quant_type is '{quant_type}'; must be \"nf4\""
        with pytest.raises(ValueError, match=message):
            Linear4bit(4, 4, quant_type=quant_type)
        with pytest.raises(ValueError, match=message):
            Params4bit(torch.ones(4), quant_type=quant_type)

    def test_storage_that_the_bytes_do_not_fill_is_refused(self):
        layer = Linear4bit(3, 2, quant_storage=torch.float32)
        with pytest.raises(ValueError, match="3 bytes of codes; quant_storage float32 needs"):
            layer.to("cpu")
        with pytest.raises(ValueError, match="quant_storage is torch.complex64; must be"):
            Linear4bit(4, 4, quant_storage=torch.complex64)

    def test_a_weight_with_nan_is_refused_by_layers_with_double_quantisation(self):
        linear = torch.nn.Linear(64, 4)
        linear.weight.data[2, 3] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            Linear4bit.from_linear(linear)
        layer = Linear4bit.from_linear(linear, compress_statistics=False)
        out = layer(torch.ones(1, 64))[0]
        assert out.isnan().tolist() == [False, False, True, False]

    def test_a_layer_that_is_not_quantised_says_so(self):
        with pytest.raises(RuntimeError, match="not quantised yet; move the layer to a device"):
            Linear4bit(64, 4)(torch.ones(1, 64))


def layer_and_input(dtype=torch.float32, **options):
    torch.manual_seed(3)
    linear = torch.nn.Linear(128, 48, dtype=dtype)
    return Linear4bit.from_linear(linear, **options), torch.randn(5, 20, 128, dtype=dtype)


class TestModule:
    # dynamo's own, on seeing an autograd function
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("tokens", [3, 40])
    def test_torch_compile_without_a_graph_break(self, tokens):
        layer, _ = layer_and_input()
        x = torch.randn(tokens, 128, requires_grad=True)
        model = torch.nn.Sequential(layer, torch.nn.GELU(), torch.nn.Linear(48, 2))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        eager, fast = model(x), compiled(x)
        torch.testing.assert_close(fast, eager)
        inputs = [x, layer.bias]
        wanted = torch.autograd.grad(eager.square().sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad(fast.square().sum(), inputs), wanted)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), eager)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, use_reentrant):
        layer, x = layer_and_input()
        x.requires_grad_()
        inputs = [x, layer.bias]
        plain = layer(x).square().sum()
        wanted = torch.autograd.grad(plain, inputs)
        again = checkpoint(layer, x, use_reentrant=use_reentrant).square().sum()
        if use_reentrant:  # which knows backward() alone
            again.backward()
            found = [tensor.grad for tensor in inputs]
        else:
            found = torch.autograd.grad(again, inputs)
        for mine, truth in zip(found, wanted, strict=True):
            assert torch.equal(mine, truth)

    @pytest.mark.parametrize("compute_dtype", [None, *DTYPES], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_compute_dtype(self, dtype, compute_dtype):
        layer, x = layer_and_input(dtype, compute_dtype=compute_dtype)
        out = layer(x)
        assert out.dtype == dtype
        inner = x.to(compute_dtype or dtype)
        same = functional.linear_nf4(inner, layer.weight, layer.quant_state, layer.bias)
        assert same.dtype == inner.dtype and torch.equal(out, same.to(dtype))

    def test_moving_to_a_device_quantises(self):
        torch.manual_seed(3)
        layer = Linear4bit(128, 48)
        full = layer.weight.data.clone()
        assert layer.quant_state is None and not layer.weight.bnb_quantized
        assert layer.weight.shape == (48, 128)
        assert layer.to("cpu") is layer
        packed, state = functional.quantize_nf4(full, double_quant=True)
        assert torch.equal(layer.weight, packed) and layer.quant_state == state
        assert isinstance(layer.weight, Params4bit) and layer.weight.bnb_quantized
        assert not layer.weight.requires_grad and layer.bias.requires_grad
        layer.to("cpu")
        assert torch.equal(layer.weight, packed) and layer.quant_state == state

    @pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=str)
    @pytest.mark.parametrize("how", ["half", "bfloat16", "double", "to"])
    def test_a_change_of_dtype_leaves_the_codes_alone(self, how, storage):
        layer, x = layer_and_input(quant_storage=storage)
        before = layer.weight.data.clone()
        expected = layer(x)
        layer = layer.to(torch.float16) if how == "to" else getattr(layer, how)()
        assert layer.weight.dtype == storage
        assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
        assert layer.quant_state.absmax.dtype == torch.uint8
        assert layer.quant_state.dtype == torch.float32 and layer.bias.dtype != torch.float32
        layer.float()
        torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)

    def test_a_change_of_dtype_before_quantising_counts(self):
        layer = Linear4bit(128, 48).half()
        assert layer.weight.dtype == torch.float16 and layer.quant_state is None
        layer.to("cpu")
        assert layer.quant_state.dtype == torch.float16

    def test_to_meta_and_the_parameter_s_own_to(self):
        layer, _ = layer_and_input()
        weight = layer.weight
        assert weight.to("cpu").quant_state == weight.quant_state
        assert weight.to(torch.float16) is weight and weight.cpu().quant_state.shape == (48, 128)
        empty = copy.deepcopy(layer).to("meta")
        assert empty.weight.device.type == "meta" == empty.quant_state.absmax.device.type
        assert layer.weight.device.type == "cpu" == layer.quant_state.absmax.device.type

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
    @pytest.mark.parametrize("quantised", [True, False])
    def test_copies(self, how, quantised):
        layer, x = layer_and_input()
        if not quantised:
            layer = Linear4bit(128, 48)
        if how == "deepcopy":
            copied = copy.deepcopy(layer)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert isinstance(copied.weight, Params4bit) and copied.weight is not layer.weight
        assert copied.quant_state == layer.quant_state
        assert copied.weight._settings() == layer.weight._settings()
        assert copied.weight.data_ptr() != layer.weight.data_ptr()
        if quantised:
            assert torch.equal(copied(x), layer(x))
            copied.weight.data.zero_()
            copied.quant_state.absmax.zero_()
            assert layer.weight.any() and layer.quant_state.absmax.any()

    def test_deepcopy_keeps_what_is_shared_shared(self):
        layer, _ = layer_and_input()
        pair = torch.nn.ModuleList([layer, layer])
        copied = copy.deepcopy(pair)
        assert copied[0].weight is copied[1].weight

    def test_from_linear_leaves_the_layer_alone(self):
        linear = torch.nn.Linear(128, 48).eval()
        before = linear.weight.clone()
        layer = Linear4bit.from_linear(linear, compress_statistics=False, blocksize=32)
        assert torch.equal(linear.weight, before) and linear.weight.requires_grad
        assert layer.bias is linear.bias and not layer.training
        assert layer.quant_state.blocksize == 32 and not layer.quant_state.nested
        assert (layer.in_features, layer.out_features) == (128, 48)
        assert Linear4bit.from_linear(torch.nn.Linear(4, 3, bias=False)).bias is None


class TestStateDict:
    NAMES = [
        "weight",
        "bias",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ]

    def test_names_and_plain_tensors(self):
        layer, _ = layer_and_input()
        entries = layer.state_dict()
        assert sorted(entries) == sorted(self.NAMES)
        assert all(type(entry) is torch.Tensor for entry in entries.values())
        assert entries["weight"].dtype == torch.uint8
        file = io.BytesIO()
        torch.save(entries, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        assert all(torch.equal(loaded[name], entries[name]) for name in self.NAMES)

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("target", ["fresh", "quantised", "meta", "meta to device"])
    def test_round_trip(self, target, double_quant):
        layer, x = layer_and_input(compress_statistics=double_quant)
        other = Linear4bit(128, 48, device="meta" if target.startswith("meta") else None)
        if target == "quantised":
            other.to("cpu")
        entries = {name: entry.clone() for name, entry in layer.state_dict().items()}
        other.load_state_dict(entries, assign=target.startswith("meta"))
        if target == "meta to device":
            other.to("cpu")
        assert isinstance(other.weight, Params4bit) and not other.weight.requires_grad
        assert other.quant_state == layer.quant_state
        assert torch.equal(other(x), layer(x))
        again = other.state_dict()
        assert list(again) == list(entries)
        assert all(torch.equal(again[name], entries[name]) for name in entries)
        entries["weight"].zero_()
        if not target.startswith("meta"):
            assert torch.equal(other(x), layer(x)), "the layer must not share what it was given"

    def test_a_weight_in_full_precision(self):
        torch.manual_seed(3)
        linear = torch.nn.Linear(128, 48)
        fresh, quantised = Linear4bit(128, 48), Linear4bit(128, 48).to("cpu")
        fresh.load_state_dict(linear.state_dict())
        assert fresh.quant_state is None and torch.equal(fresh.weight, linear.weight)
        fresh.to("cpu")
        quantised.load_state_dict(linear.state_dict())
        assert quantised.quant_state == fresh.quant_state
        assert torch.equal(quantised.weight, fresh.weight)
        assert quantised.quant_state == Linear4bit.from_linear(linear).quant_state

    def test_inside_a_model(self):
        layer, x = layer_and_input()
        model = torch.nn.Sequential(torch.nn.Identity(), layer)
        other = torch.nn.Sequential(torch.nn.Identity(), Linear4bit(128, 48))
        missing = other.load_state_dict(model.state_dict())
        assert not missing.missing_keys and not missing.unexpected_keys
        assert torch.equal(other(x), model(x))

    def test_nothing_missing_and_nothing_left_over(self):
        layer, _ = layer_and_input()
        entries = layer.state_dict()
        del entries["weight"]
        report = Linear4bit(128, 48).load_state_dict(entries, strict=False)
        assert report.missing_keys == ["weight"]
        assert sorted(report.unexpected_keys) == sorted(self.NAMES[2:])
        with pytest.raises(RuntimeError, match="Missing key"):
            Linear4bit(128, 48).load_state_dict(entries)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda e: e.pop("weight.absmax"), "absmax missing"),
            (lambda e: e.pop("weight.quant_state.bitsandbytes__nf4"), "found none; must be"),
            (
                lambda e: e.update(
                    {
                        "weight.quant_state.bitsandbytes__fp4": e.pop(
                            "weight.quant_state.bitsandbytes__nf4"
                        )
                    }
                ),
                "found weight.quant_state.bitsandbytes__fp4; must be",
            ),
            (
                lambda e: e.update(weight=e["weight"][:-1]),
                "3072 bytes of codes; the weight has 3071",
            ),
            (
                lambda e: e.update({"weight.absmax": e["weight.absmax"][1:]}),
                "absmax has 95 elements",
            ),
            (
                lambda e: e.update({"weight.nested_absmax": torch.ones(2)}),
                "nested_absmax has 2 elements; must be 1",
            ),
            (lambda e: e.update({"weight.SCB": torch.ones(48)}), "SCB unknown"),
        ],
    )
    def test_entries_that_do_not_fit_change_nothing(self, spoil, message):
        layer, x = layer_and_input()
        expected, entries = layer(x), dict(Linear4bit(128, 48).to("cpu").state_dict())
        entries["bias"] = layer.bias.detach().clone()
        spoil(entries)
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(entries)
        assert torch.equal(layer(x), expected)

    def test_another_shape_is_refused(self):
        layer, _ = layer_and_input()
        for other in (Linear4bit(48, 128, bias=False), Linear4bit(128, 47, bias=False)):
            entries = {k: v for k, v in layer.state_dict().items() if k != "bias"}
            with pytest.raises(RuntimeError, match=r"shape is \(48, 128\); must be \("):
                other.load_state_dict(entries)
            with pytest.raises(RuntimeError, match=r"has shape \(48, 128\); must be \("):
                other.load_state_dict({"weight": torch.ones(48, 128)})


class TestOperators:
    @pytest.mark.parametrize("tokens", [2, 40])
    def test_the_operators_keep_torch_s_rules(self, tokens):
        from oddsmith.linear4bit import _linear_nf4, _linear_nf4_input_gradient
        from oddsmith.quant import scale_arguments

        checks = ("test_schema", "test_faketensor")
        x, packed, state, bias, upstream = problem(tokens, 23, 67, torch.bfloat16)
        weight = packed, *scale_arguments(state), 64, 23, 67
        arguments = x.detach(), bias.detach(), *weight
        torch.library.opcheck(_linear_nf4, arguments, test_utils=checks)
        arguments = upstream, *weight, torch.float32
        torch.library.opcheck(_linear_nf4_input_gradient, arguments, test_utils=checks)
