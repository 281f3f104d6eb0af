"""Attention on packed rows for every name that a model's attention has in transformers."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from oddsmith.integrations import model_attention
from oddsmith.integrations.packed_attention import attend
from oddsmith.integrations.packed_masks import CannotPack, RowMask
from oddsmith.packing.batch import PackedBatch
from oddsmith.packing.pattern import Pattern
from support import flash_stand_in
from support.packed_models import FAMILIES, both, padded, pairs_of, tiny

HUB = "kernels-community/flash-attn2"


@pytest.fixture
def hub_kernel(monkeypatch):
    """As if transformers had loaded a flash kernel from the hub."""
    monkeypatch.setitem(AttentionInterface._global_mapping, HUB, flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, HUB, flash_attention_mask)


def assert_close(mine, true):
    room = 1e-5 * max(1.0, float(true.abs().max()))
    torch.testing.assert_close(mine, true, rtol=0, atol=room)


def distance(x, y):
    return (x.float() - y).norm()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "name", ["eager", "flex_attention", "flash_attention_2", "flash_attention_3", HUB]
)
@pytest.mark.parametrize("window", [None, 4])
def test_a_model_packs_under_every_name(name, window, share, hub_kernel):
    # Without the package, so that our own kernels for the CPU compute the row; in float32.
    model = tiny("Mistral", attention=name, sliding_window=window)
    truth, packed = both(model, pairs_of(), share, reference="sdpa")
    torch.testing.assert_close(packed, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_kind_of_attention_packs(family, share):
    model = tiny(family, attention="eager")
    (truth, true_grads), (packed, grads) = both(model, pairs_of(), share)
    assert_close(packed, truth)
    assert grads.keys() == true_grads.keys()
    for key, grad in true_grads.items():
        assert_close(grads[key], grad)
    if family == "GptOss":
        assert true_grads["model.layers.0.self_attn.sinks"].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "DeepseekV3", "Llama4Text"])
def test_bfloat16_is_as_close_to_the_truth_as_the_padded_batch(family):
    model = tiny(family, torch.bfloat16, "eager")
    exact = tiny(family, attention="eager")
    exact.load_state_dict(model.state_dict())
    # Experts are chosen by scores that a rounding may turn around: everywhere the same ones.
    for each in (model, exact):
        for module in each.modules():
            if hasattr(module, "top_k"):
                module.top_k = getattr(module, "num_experts", 4)
    (plain, plain_grads), (packed, packed_grads) = both(model, pairs_of())
    (truth, true_grads), _ = both(exact, pairs_of())
    assert distance(packed, truth) <= 1.5 * distance(plain, truth)
    for key, grad in true_grads.items():
        bound = 1.5 * distance(plain_grads[key], grad) + 1e-2 * grad.norm()
        assert distance(packed_grads[key], grad) <= bound, key


@pytest.mark.parametrize("name", ["flash_attention_2", HUB])
@pytest.mark.parametrize("window", [None, 4])
def test_the_installed_kernel_computes_the_row(name, window, hub_kernel, monkeypatch):
    calls = flash_stand_in.install(monkeypatch)
    # Normalisation in float32, as in a model for QLoRA: the kernel gets 16 bits all the same.
    model = tiny("Mistral", torch.bfloat16, name, sliding_window=window)
    exact = tiny("Mistral", attention="sdpa", sliding_window=window)
    exact.load_state_dict(model.state_dict())
    (plain, plain_grads), (packed, packed_grads) = both(model, pairs_of())
    assert len(calls) == model.config.num_hidden_layers
    (truth, true_grads), _ = both(exact, pairs_of())
    assert distance(packed, truth) <= 1.5 * distance(plain, truth)
    for key, grad in true_grads.items():
        bound = 1.5 * distance(plain_grads[key], grad) + 1e-2 * grad.norm()
        assert distance(packed_grads[key], grad) <= bound, key


def test_queries_in_float32_are_cast_as_flash_attention_does(monkeypatch):
    calls = flash_stand_in.install(monkeypatch)
    model = tiny("Qwen3", torch.bfloat16, "flash_attention_2", head_dim=8)
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    (plain, _), (packed, _) = both(model, pairs_of())
    assert len(calls) == 2 and calls[0][0][0].dtype == torch.bfloat16
    torch.testing.assert_close(packed, plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "sdpa"])
def test_other_calls_are_passed_on_while_a_row_lives(name, monkeypatch):
    flash_stand_in.install(monkeypatch)
    model = tiny("Llama", torch.bfloat16, name)
    ids, mask, _ = padded(pairs_of())
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    before = model(**inputs).logits
    row = model_attention.packed_inputs(PackedBatch.build(pairs_of(), True))
    assert torch.equal(model(**inputs).logits, before)
    assert not row["oddsmith_row"].seen
    del row
    assert torch.equal(model(**inputs).logits, before)


class Layer(torch.nn.Module):
    pass


def call(**changes):
    """A call of the attention function by a layer of two heads, on a row of three tokens."""
    row = model_attention.packed_inputs(PackedBatch.build(pairs_of(((1, 1, 1),)), False))
    x = torch.randn(1, 2, 4, 8)
    mask = RowMask.of(torch.ones(1, 1, 1, 1, dtype=torch.bool), Pattern())
    options = {
        "attention_mask": mask,
        "theirs": None,
        "name": "sdpa",
        "oddsmith_row": row["oddsmith_row"],
    }
    return attend(Layer(), x, x, x, **{**options, **changes})


def eager_of_its_own(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return module.bias(query), None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_bias": torch.ones(1, 2, 4, 4)}, "its attention has a position_bias"),
        ({"indices": torch.ones(4)}, "its attention has a indices"),
        ({"is_causal": False}, "its attention is not causal"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "a mask of its own"),
        (
            {"attention_mask": RowMask.of(torch.ones(1, 4))},
            "a mask of its own",
        ),
        ({"name": "eager", "theirs": eager_of_its_own}, "an eager function of its own"),
    ],
)
def test_what_is_not_computed_on_packed_rows_is_refused(changes, reason):
    assert call()[0].shape == (1, 4, 2, 8)
    with pytest.raises(CannotPack, match=reason):
        call(**changes)


def test_what_flash_attention_sees_is_its_window():
    # transformers gives flash attention the mask of the padding, and the window apart.
    given = {"attention_mask": RowMask.of(torch.ones(1, 4)), "name": "flash_attention_2"}
    torch.manual_seed(0)
    wide = call(**given)[0]
    torch.manual_seed(0)
    narrow = call(**given, sliding_window=1)[0]
    assert not torch.allclose(wide, narrow)
