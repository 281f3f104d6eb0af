"""Linear4bit: everything that happens to a module, from a move to a checkpoint."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from oddsmith import functional
from oddsmith.nn import Linear4bit, Params4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TestArguments:
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
    # of dynamo, for an autograd function
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
        if use_reentrant:  # which supports only backward()
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
