"""Layers of bitsandbytes: replaced, restored, and unchanged where that is not possible."""

import pytest
import torch
from torch import nn

from oddsmith import adopt
from oddsmith.integrations.bitsandbytes_layers import AdoptedLayers, KeptLayout, on_cpu
from oddsmith.nn import Linear4bit

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def model_of(quant_type="nf4"):
    torch.manual_seed(0)
    layers = [
        bitsandbytes.nn.Linear4bit(64, 64, quant_type=quant_type, compute_dtype=torch.float32)
        for _ in range(2)
    ]
    return nn.Sequential(*layers, nn.Linear(64, 3)).to("cpu")


def test_layers_come_back_with_the_codes_that_they_share():
    model = model_of()
    theirs, x = list(model), torch.randn(4, 64)
    expected = model(x).detach()
    codes = [layer.weight.data_ptr() for layer in theirs[:2]]
    patch = AdoptedLayers(model)
    with patch:
        assert [type(layer) for layer in model] == [Linear4bit, Linear4bit, nn.Linear]
        assert [layer.weight.data_ptr() for layer in model[:2]] == codes
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        model.eval()
    assert list(model) == theirs and not theirs[0].training
    model.train()  # in evaluation theirs would get a new layout
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_with_an_adapter_stays_as_its_adapter_knows_it():
    from peft import LoraConfig, get_peft_model

    model = model_of()
    patch = AdoptedLayers(model)
    assert patch.apply()
    second = model[1]
    get_peft_model(model, LoraConfig(r=2, target_modules=["1"]))
    patch.undo()
    assert type(model[0]).__module__.startswith("bitsandbytes.")
    assert model[1].get_base_layer() is second


def test_what_cannot_be_taken_over_stays_with_a_line(caplog):
    model = model_of("fp4")
    theirs = list(model)
    assert not AdoptedLayers(model).apply()
    assert list(model) == theirs
    (line,) = caplog.messages
    assert "quant_type 'fp4'" in line and "needs more time" in line
    with pytest.raises(ValueError, match="0 has quant_type 'fp4'"):
        adopt(model)


@pytest.mark.parametrize("name", ["absmax", "blocksize", "code", "quant_type", "dtype"])
def test_an_unknown_state_of_bitsandbytes_is_kept_with_a_log_line(name, caplog):
    model = model_of()
    theirs = list(model)
    delattr(model[1].weight.quant_state, name)
    assert not AdoptedLayers(model).apply()
    assert list(model) == theirs
    (line,) = caplog.messages
    assert name in line and "needs more time" in line


def test_where_the_layers_are():
    assert on_cpu(model_of()) and not on_cpu(nn.Linear(2, 2))
    assert not on_cpu(nn.Sequential(Linear4bit(64, 64)))


def relaid(layer):
    """A layer as it is after an evaluation on a CPU with bfloat16 instructions."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    return layer


@pytest.mark.parametrize("nested", [False, True])
def test_the_layout_after_an_evaluation_is_undone(nested):
    def layer():
        torch.manual_seed(1)
        made = bitsandbytes.nn.Linear4bit(
            128,
            64,
            bias=False,
            quant_type="nf4",
            compute_dtype=torch.float32,
            compress_statistics=nested,
        )
        return nn.Sequential(made).to("cpu")

    x, model = torch.randn(3, 128), layer()
    expected = model(x).detach()
    adopted = adopt(nn.Sequential(relaid(layer()[0])))
    # The scales have been rounded to bfloat16 meanwhile.
    torch.testing.assert_close(adopted(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("nested", [False, True])
def test_fp4_layers_keep_their_layout_and_give_gradients(nested):
    torch.manual_seed(1)
    options = {"quant_type": "fp4", "compute_dtype": torch.float32, "compress_statistics": nested}
    layers = [bitsandbytes.nn.Linear4bit(64, 64, **options) for _ in range(2)]
    model = nn.Sequential(*layers).to("cpu")
    for layer in model:
        layer.support_avx512bf16_for_cpu = True  # as on a CPU that has the instructions
    x = torch.randn(3, 64)
    expected = model(x.requires_grad_()).detach()
    x.requires_grad_(False)
    codes = [layer.weight.data.clone() for layer in model]
    with KeptLayout(model):
        model.eval()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a.weight.data, b) for a, b in zip(model, codes))
        model.train()
        x.requires_grad_()
        model(x).sum().backward()
        assert x.grad.abs().max() > 0
    assert all(layer.support_avx512bf16_for_cpu for layer in model)
    relaid(model[1])
    with KeptLayout(model):
        assert torch.equal(model[1].weight.data, codes[1])
        torch.testing.assert_close(model(x), expected, rtol=3e-2, atol=3e-2)


def test_layers_below_an_adapter_are_replaced_and_come_back():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["0", "1"]))
    theirs = [layer.get_base_layer() for layer in adapted.get_base_model()[:2]]
    x = torch.randn(4, 64)
    expected = adapted(x).detach()
    with AdoptedLayers(adapted) as replaced:
        assert replaced
        ours = [layer.get_base_layer() for layer in adapted.get_base_model()[:2]]
        assert [type(layer) for layer in ours] == [Linear4bit, Linear4bit]
        adapted.eval()
        torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-5)
        adapted.train()
        adapted(x).sum().backward()
        assert adapted.get_base_model()[0].lora_B["default"].weight.grad.abs().max() > 0
    assert [layer.get_base_layer() for layer in adapted.get_base_model()[:2]] == theirs
    with pytest.raises(ValueError, match="has an adapter; adopt the model before it gets one"):
        adopt(adapted)


def test_an_adapter_that_is_merged_meanwhile_is_no_error():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["0", "1"]))
    patch = AdoptedLayers(adapted)
    assert patch.apply()
    adapted.unload()
    patch.undo()
