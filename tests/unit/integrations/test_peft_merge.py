"""Adapters of every method of peft, merged into 4-bit layers."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from oddsmith.functional import dequantize_nf4
from oddsmith.integrations.peft_dispatch import serve_peft
from oddsmith.nn import Linear4bit
from support.peft_methods import method_config
from support.releases import release
from support.trainer_runs import make_model, make_tokenizer

# peft and some of its methods warn of their own matters.
pytestmark = pytest.mark.filterwarnings("ignore")

# The methods that train on 4-bit layers and merge; others read the weight itself, or cannot merge.
MERGED = (
    "ADALORA",
    "BOFT",
    "C3A",
    "FOURIERFT",
    "GRALORA",
    "IA3",
    "LORA",
    "MISS",
    "OFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
# These add in place to the output of the layer.
IN_PLACE = ("ADALORA", "C3A", "GRALORA")
TOKENS = torch.arange(24).view(2, 12) + 3


@pytest.fixture(scope="module")
def twins():
    """A model with 4-bit projections, and one with the same weights in full."""
    serve_peft()
    small = make_model("mistral", make_tokenizer())
    full = copy.deepcopy(small)
    for ours, theirs in zip(small.model.layers, full.model.layers, strict=True):
        for name in ("q_proj", "v_proj"):
            layer = Linear4bit.from_linear(getattr(ours.self_attn, name))
            setattr(ours.self_attn, name, layer)
            weight = dequantize_nf4(layer.weight, layer.quant_state, torch.float32)
            getattr(theirs.self_attn, name).weight.data = weight
    return small, full


def adapted(model, name):
    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(model), method_config(name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            # The same for both, and not neutral.
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
            parameter.data += 0.05 * noise
    return model.eval()


@pytest.mark.parametrize("name", MERGED)
def test_the_merged_weight_is_that_of_the_full_layer_in_4_bits(twins, name):
    if name == "BOFT" and release("peft") < (0, 21):
        pytest.skip(
            "peft before 0.21 reads the codes of a 4-bit layer as its weight in BOFT's forward"
        )
    small, full = (adapted(model, name) for model in twins)
    torch.testing.assert_close(small(TOKENS).logits, full(TOKENS).logits, rtol=1e-4, atol=1e-4)
    small, full = small.merge_and_unload(), full.merge_and_unload()
    for ours, theirs in zip(small.model.layers, full.model.layers, strict=True):
        for part in ("q_proj", "v_proj"):
            layer = getattr(ours.self_attn, part)
            assert type(layer) is Linear4bit
            found = dequantize_nf4(layer.weight, layer.quant_state)
            expected = Linear4bit.from_linear(getattr(theirs.self_attn, part))
            expected = dequantize_nf4(expected.weight, expected.quant_state)
            # A value that is between two codes can be rounded either way.
            assert ((found - expected).abs() > 1e-6).float().mean() < 2e-3


def trained(model):
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)


@pytest.mark.parametrize("name", IN_PLACE)
def test_gradients_of_adapters_that_add_in_place(twins, name):
    grads = []
    for model in twins:
        model = adapted(model, name)
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append({key: each.grad for key, each in trained(model)})
    assert grads[0] and all(grad.abs().max() > 0 for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["VERA", "ROAD"])
def test_unmerged_again(twins, name):
    model = adapted(twins[0], name)
    before = model(TOKENS).logits
    model.merge_adapter()
    model.unmerge_adapter()
    after = model(TOKENS).logits
    # Rounded to 4 bits twice.
    assert (after - before).abs().mean() < 0.1 * before.std()


def test_an_adapter_with_nan_changes_nothing(twins):
    model = adapted(twins[0], "VERA")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    codes = layer.get_base_layer().weight
    layer.vera_lambda_d["default"].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert layer.get_base_layer().weight is codes
    assert "merge" not in vars(layer) and "unmerge" not in vars(layer)


def test_layers_in_full_precision_are_left_to_peft(twins):
    model = adapted(twins[1], "IA3")
    before = model(TOKENS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, before)
    assert all("merge" not in vars(module) for module in model.modules())


def test_a_layer_without_codes_says_so():
    from oddsmith.integrations.peft_merge import in_full

    with pytest.raises(RuntimeError, match="not quantised yet"), in_full(Linear4bit(64, 8)):
        pass
    layer = Linear4bit.from_linear(nn.Linear(64, 8))
    with in_full(layer):
        assert layer.weight.shape == (8, 64) and layer.weight.dtype == torch.float32
    assert layer.weight.quant_state is not None
