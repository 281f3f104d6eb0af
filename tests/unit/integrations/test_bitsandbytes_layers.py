"""Layers of bitsandbytes: replaced, restored, and unchanged where that is not possible."""

import pytest
import torch
from torch import nn

from oddsmith import adopt
from oddsmith.integrations.bitsandbytes_layers import AdoptedLayers, on_cpu
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
    assert "quant_type 'fp4'" in line and "give no gradient" in line
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
    assert name in line and "give no gradient" in line


def test_where_the_layers_are():
    assert on_cpu(model_of()) and not on_cpu(nn.Linear(2, 2))
    assert not on_cpu(nn.Sequential(Linear4bit(64, 64)))
