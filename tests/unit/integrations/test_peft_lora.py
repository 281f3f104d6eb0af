"""LoRA on 4-bit layers: the fused projection, training, saving and merging."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from oddsmith.functional import dequantize_nf4
from oddsmith.integrations.nf4_config import NF4Config
from oddsmith.integrations.peft_lora import LoraLinear4bit
from oddsmith.nn import Linear4bit
from oddsmith.quant.linear import linear_nf4_lora
from support.trainer_runs import make_model, make_tokenizer

# Repeated merging into 4 bits is what the test is about.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def projection(dtype, adapter_dtype, bias=True, rows=(3, 7), rank=4):
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(nn.Linear(96, 40, bias=bias).to(dtype))
    x = torch.randn(*rows, 96, dtype=dtype, requires_grad=True)
    lora_a = torch.randn(rank, 96, dtype=adapter_dtype, requires_grad=True)
    lora_b = torch.randn(40, rank, dtype=adapter_dtype, requires_grad=True)
    return layer, x, lora_a, lora_b


def naive(x, weight, lora_a, lora_b, scaling, bias):
    out = nn.functional.linear(x, weight, bias)
    return out + scaling * (x @ lora_a.T @ lora_b.T)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "bound"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float16, torch.float32, 3e-3),
    ],
)
@pytest.mark.parametrize("rows", [(3, 7), (1, 1), (5,)])
def test_values_and_gradients(dtype, adapter_dtype, bound, rows):
    layer, *inputs = projection(dtype, adapter_dtype, rows=rows)
    bias = layer.bias
    out = linear_nf4_lora(inputs[0], layer.weight, layer.weight.quant_state, *inputs[1:], 0.7, bias)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [*inputs, bias], grad)
    weight = dequantize_nf4(layer.weight, layer.weight.quant_state).double()
    doubles = [each.detach().double().requires_grad_() for each in (*inputs, bias)]
    truth = naive(doubles[0], weight, *doubles[1:3], 0.7, doubles[3])
    expected = torch.autograd.grad(truth, doubles, grad.double())
    for ours, theirs in zip((out, *found), (truth, *expected), strict=True):
        assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max()


def test_gradients_are_computed_only_if_needed():
    layer, x, lora_a, lora_b = projection(torch.float32, torch.float32)
    x = x.detach()
    lora_a.requires_grad_(False)
    state = layer.weight.quant_state
    linear_nf4_lora(x, layer.weight, state, lora_a, lora_b, 0.7).sum().backward()
    assert lora_a.grad is None and lora_b.grad is not None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_under_torch_compile():
    layer, x, lora_a, lora_b = projection(torch.float32, torch.float32)

    def run(x, lora_a, lora_b):
        return linear_nf4_lora(x, layer.weight, layer.weight.quant_state, lora_a, lora_b, 0.7)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, lora_a, lora_b)
    plain = run(x, lora_a, lora_b)
    torch.testing.assert_close(compiled, plain)
    found = torch.autograd.grad(compiled.square().sum(), [x, lora_a, lora_b])
    expected = torch.autograd.grad(plain.square().sum(), [x, lora_a, lora_b])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lora_a": torch.zeros(3, 96)}, ValueError, r"lora_a has shape \(3, 96\)"),
        ({"lora_a": torch.zeros(4, 95)}, ValueError, r"a weight of \(40, 95\); must be \(40, 96\)"),
        ({"lora_a": torch.zeros(4, 96).bfloat16()}, TypeError, "must be that of lora_a"),
        ({"x": torch.zeros(2, 95)}, ValueError, "95"),
    ],
)
def test_bad_input(change, error, words):
    layer, x, lora_a, lora_b = projection(torch.float32, torch.float32)
    given = {"x": x, "lora_a": lora_a, "lora_b": lora_b, **change}
    with pytest.raises(error, match=words):
        linear_nf4_lora(packed=layer.weight, state=layer.weight.quant_state, scaling=1.0, **given)


# --- In peft ---


@pytest.fixture
def folder(tmp_path):
    make_model("mistral", make_tokenizer()).save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def adapted(folder, **settings):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())
    config = LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model


TOKENS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 3}])
def test_the_fused_way_is_that_of_peft(folder, settings, monkeypatch):
    model = adapted(folder, **settings)
    layers = [m for m in model.modules() if isinstance(m, LoraLinear4bit)]
    assert len(layers) == 7 * model.config.num_hidden_layers

    def run():
        model.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return loss.detach(), grads

    loss, grads = run()
    assert grads and all("lora_" in name for name in grads)
    monkeypatch.setattr(LoraLinear4bit, "_only_adapter", lambda *_: None)
    expected, theirs = run()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, theirs, rtol=1e-4, atol=1e-6)


def test_dropout_and_several_adapters_go_the_way_of_peft(folder):
    model = adapted(folder, lora_dropout=0.5)
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear4bit))
    model.train()
    assert layer._only_adapter((), {}) is None
    model.eval()
    assert layer._only_adapter((), {}) == "default"
    assert layer._only_adapter((), {"adapter_names": ["default"]}) is None
    with model.disable_adapter():
        assert layer._only_adapter((), {}) is None


def test_saves_and_loads(folder, tmp_path):
    model = adapted(folder).eval()
    before = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert any(isinstance(m, LoraLinear4bit) for m in again.modules())
    torch.testing.assert_close(again(TOKENS).logits, before)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_rounds_the_sum_to_four_bits(folder, safe):
    model = adapted(folder).eval()
    name = "model.layers.0.mlp.up_proj"
    layer = model.base_model.model.get_submodule(name)
    state = layer.base_layer.weight.quant_state
    full = dequantize_nf4(layer.base_layer.weight, state) + layer.get_delta_weight("default")
    expected = Linear4bit.from_linear(plain := nn.Linear(full.shape[1], full.shape[0], bias=False))
    plain.weight.data = full
    expected = Linear4bit.from_linear(plain, compress_statistics=state.nested)
    merged = model.merge_and_unload(safe_merge=safe)
    found = merged.get_submodule(name)
    assert type(found) is Linear4bit
    assert torch.equal(found.weight.data, expected.weight.data)
    assert torch.equal(found.weight.quant_state.absmax, expected.weight.quant_state.absmax)


def test_a_broken_adapter_leaves_the_base_alone(folder):
    model = adapted(folder)
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear4bit))
    before = layer.base_layer.weight
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert layer.base_layer.weight is before and not layer.merged


def test_unmerging_comes_back_but_for_rounding(folder):
    model = adapted(folder).eval()
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear4bit))
    before = dequantize_nf4(layer.base_layer.weight, layer.base_layer.weight.quant_state)
    layer.merge()
    assert layer.merged
    layer.unmerge()
    after = dequantize_nf4(layer.base_layer.weight, layer.base_layer.weight.quant_state)
    assert (after - before).norm() < 0.25 * before.norm()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora is not supported for 4-bit layers"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
    ],
)
def test_what_cannot_work_is_refused(folder, settings, words):
    with pytest.raises(ValueError, match=words):
        adapted(folder, **settings)
