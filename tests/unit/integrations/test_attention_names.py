"""The name of a model's attention, and another one for a while."""

import copy

import pytest

from oddsmith.integrations.attention_names import (
    attention_name,
    attention_named,
    configs_of,
    plain_attention,
)
from support.packed_models import tiny


@pytest.mark.parametrize(
    ("name", "plain"),
    [("sdpa", "sdpa"), ("eager", "eager"), ("flash_attention_2", "eager"), ("flex", "eager")],
)
def test_what_a_name_is_compared_with(name, plain):
    model = tiny("Llama")
    model.config._attn_implementation_internal = name
    assert attention_name(model) == name and plain_attention(model) == plain


def test_another_name_in_a_context():
    model = tiny("Llama", attention="sdpa")
    # A part with a copy of the configuration.
    model.model.layers[0].self_attn.config = copy.deepcopy(model.config)
    with pytest.raises(ZeroDivisionError), attention_named(model, "eager"):
        assert attention_name(model) == "eager"
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
        1 / 0  # noqa: B018
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert attention_name(model) == "sdpa"


def test_configurations_within_one():
    config = tiny("Llama").config
    config.inner = copy.deepcopy(config)
    config.inner.vocab_size += 1
    assert [each is config for each in configs_of(config)] == [True, False]
