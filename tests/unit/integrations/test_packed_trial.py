"""The trial of a packed row: it sees what is wrong, in any dtype, and proves something."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from oddsmith.integrations.packed_trial import DIFFERS, Blind, try_out
from oddsmith.integrations.small_model import small_model

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(kind=LlamaForCausalLM, **options):
    return small_model(kind(LlamaConfig(**SIZES, **options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_that_attends_passes(dtype):
    assert try_out(llama().to(dtype), room=16 if dtype == torch.bfloat16 else 800) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_pass(dtype):
    model = small_model(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)))
    assert try_out(model.to(dtype), room=16 if dtype == torch.bfloat16 else 800) is None


class Shifted(nn.Module):
    """Adds a little of the position before, as a convolution or a token shift would."""

    def __init__(self, inner, share):
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x):
        return self.inner(x + self.share * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_leak_is_seen_whatever_the_tolerance(dtype):
    model = llama()
    layer = model.model.layers[1]
    layer.mlp = Shifted(layer.mlp, 0.05)
    model = model.to(dtype)
    assert "change with the tokens of another" in try_out(model, room=1e9)


class ByRow(nn.Module):
    """Depends on the place in the row, not on the position in the sequence."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        place = torch.arange(x.shape[1])[None, :, None]
        return self.inner(x * (1.0 + 0.01 * place))


def test_what_depends_on_the_place_in_the_row_differs():
    model = llama()
    layer = model.model.layers[0]
    layer.mlp = ByRow(layer.mlp)
    assert try_out(model) == DIFFERS


def test_a_layer_that_does_not_attend_is_named():
    model = llama()

    def forward(hidden_states, **kwargs):
        return hidden_states, None

    model.model.layers[1].self_attn.forward = forward
    assert "layer 1 (LlamaDecoderLayer) does not attend through" in try_out(model)


def test_a_model_that_cannot_run_gives_its_error():
    model = llama()
    del model.model.norm
    assert "could not be tried out (AttributeError: " in try_out(model)


def test_code_that_does_not_exist_is_a_reason_too(monkeypatch):
    model = llama()

    def forward(*args, **kwargs):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(model.model, "forward", forward)
    assert "(NotImplementedError: no such kernel)" in try_out(model)


def test_results_that_prove_nothing():
    model = llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name:
                p.zero_()
    with pytest.raises(Blind):
        try_out(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(Blind):
        try_out(model)


def test_the_model_is_left_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    try_out(model)
    assert model.training and not model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
