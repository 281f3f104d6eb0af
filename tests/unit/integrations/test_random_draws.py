"""Models that draw random numbers in training."""

import pytest
import torch
from torch import nn

from oddsmith.integrations.model_packing import CannotPack, check
from oddsmith.integrations.random_draws import draws_for_tokens
from support.packed_models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("family", "options"),
    [("Phimoe", {}), ("Mixtral", {"num_local_experts": 2, "router_jitter_noise": 0.1})],
)
def test_routers_that_draw_are_found(family, options):
    model = tiny(family, **options)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    assert draws_for_tokens(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(CannotPack, match="draws random numbers for each token"):
        check(model)


def test_dropout_is_no_such_draw_and_stays_as_it_was():
    model = tiny("Llama", attention_dropout=0.3)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.2))
    assert not draws_for_tokens(model)
    assert model.model.layers[0].mlp[1].p == 0.2
    assert model.model.layers[0].self_attn.attention_dropout == 0.3


def test_a_draw_for_each_layer_is_the_same_in_any_row():
    sizes = {"ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    model = tiny("OPT", layerdrop=0.5, **sizes)  # layers that are skipped
    assert not draws_for_tokens(model)


def test_a_model_that_cannot_run_is_left_to_the_run():
    model = tiny("Llama")
    model.model.norm = None
    assert not draws_for_tokens(model)
