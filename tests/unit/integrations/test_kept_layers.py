"""How many layers keep their activations."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oddsmith.integrations.kept_layers import (
    KeptLayers,
    LayerStack,
    SavedRate,
    is_checkpointed,
)
from oddsmith.integrations.saved_bytes import SavedBytes
from support.models import checkpointed
from support.trainer_runs import make_model, make_tokenizer


def measured(*points):
    rate = SavedRate()
    for tokens, length, saved in points:
        rate.add(tokens, length, saved)
    return rate


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# ---- Bytes of a layer ----


def test_a_rate_that_is_not_measured():
    rate = SavedRate()
    assert rate.bytes(10, 5) is None and rate.is_open(5) and not rate.is_known


def test_one_measurement_bounds_longer_rows():
    rate = measured((20, 10, 2000))
    assert rate.bytes(40, 10) == 4000  # 100 a token
    assert rate.bytes(40, 5) == 4000  # none of it may depend on the length
    assert rate.bytes(40, 30) == 12000  # all of it may
    assert not rate.is_open(11) and rate.is_open(13) and rate.is_open(8)


@pytest.mark.parametrize("constant, slope", [(50, 0), (50, 3), (0, 3)])
def test_two_measurements_are_a_line(constant, slope):
    def saved(tokens, length):
        return tokens * (constant + slope * length)

    rate = measured(
        *((tokens, length, saved(tokens, length)) for tokens, length in [(9, 9), (40, 20)])
    )
    for tokens, length in [(7, 3), (30, 12), (20, 20)]:
        assert rate.bytes(tokens, length) == pytest.approx(saved(tokens, length))
    assert rate.bytes(64, 32) >= saved(64, 32)
    assert rate.is_open(32) and not rate.is_open(12) and not rate.is_open(2)
    rate.add(64, 32, saved(64, 32))
    assert rate.bytes(40, 31) == pytest.approx(saved(40, 31))


# ---- The last layers ----


def stack_of(rates, budget, share=1.0):
    return LayerStack(rates, share, lambda tokens: budget)


@pytest.mark.parametrize(
    "budget, first", [(0, 4), (99, 4), (100, 3), (250, 2), (399, 1), (400, 0), (10**9, 0)]
)
def test_as_many_of_the_last_layers_as_fit(budget, first):
    stack = stack_of([measured((10, 5, 100))] * 4, budget)
    assert stack.first_kept(10, 5) == first
    assert stack.kept == (4 - first, 100 * (4 - first), 10)
    # Twice the tokens keep half of the layers.
    assert stack.first_kept(20, 5) == 4 - (
        4 - first if first == 0 and budget > 800 else budget // 200
    )


def test_one_layer_of_an_unknown_kind_at_a_time():
    known, other = measured((10, 5, 100)), SavedRate()
    assert stack_of([SavedRate()] * 3, 0).first_kept(10, 5) == 2  # even without a budget
    assert stack_of([known, other, known, other, known], 10**6).first_kept(10, 5) == 3
    assert stack_of([known, other, known], 50).first_kept(10, 5) == 3


# ---- A model ----


def small_model(name="mistral", reentrant=False, lora=False, attention="sdpa"):
    torch.manual_seed(5)
    model = make_model(name, make_tokenizer(name))
    model.set_attn_implementation(attention)
    if lora:
        adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    if lora and reentrant:
        model.enable_input_require_grads()
    return checkpointed(model, reentrant)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
    }


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_the_same_to_the_bit(reentrant, lora):
    model = small_model(reentrant=reentrant, lora=lora)
    ids = torch.randint(3, 40, (2, 17))
    expected = gradients(model, ids)
    budget = [0.0]
    kept = KeptLayers(model, lambda tokens: budget[0])
    with kept:
        counts = []
        for budget[0] in (0.0, 0.0, 1e9, 1e9):
            found = gradients(model, ids)
            counts.append(kept.kept_layers)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert counts == [1, 0, kept.layers, kept.layers] and kept.layers >= 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_kept_is_within_the_budget(attention):
    """The bytes that autograd saves in kept layers, over batches whose lengths have a heavy tail."""
    model = small_model(attention=attention)
    parameters = [*model.parameters(), *model.buffers()]
    rng, none = random.Random(1), small_model(attention=attention)
    above = []
    limit = 600_000
    kept = KeptLayers(model, lambda tokens: limit)
    with kept:
        for _ in range(100):
            length = min(400, int(8 * rng.paretovariate(1.0)))
            ids = torch.randint(3, 40, (rng.randint(1, 4), length))
            with SavedBytes(parameters) as saved:
                out = model(ids, use_cache=False)
            with SavedBytes([*none.parameters(), *none.buffers()]) as inputs:
                none(ids, use_cache=False)
            del out
            above.append((kept.kept_layers, saved.total - inputs.total))
    # The first batch is measured.
    assert all(extra <= 1.05 * limit for _, extra in above[1:])
    assert {count for count, _ in above} == {0, 1, 2}


def test_nothing_is_left_on_the_model():
    model = small_model()
    before = [dict(vars(layer)) for layer in model.model.layers]
    kept = KeptLayers(model, lambda tokens: 1e9)
    with kept:
        copy.deepcopy(model)
        assert kept.is_applied()
        checkpointed(model)  # has its own functions again
        assert not kept.is_applied()
    model = small_model()
    with KeptLayers(model, lambda tokens: 1e9):
        pass
    assert [vars(layer).keys() for layer in model.model.layers] == [each.keys() for each in before]


def test_what_has_no_graph_measures_nothing():
    model = small_model()
    ids = torch.randint(3, 40, (2, 17))
    kept = KeptLayers(model, lambda tokens: 1e9)
    with kept:
        with torch.no_grad():
            model(ids, use_cache=False)
        assert not kept.is_measured
        gradients(model, ids)
        assert kept.is_measured and kept.stacks[0].rates[-1].bytes(34, 17) > 0


def test_frozen_layers_before_the_first_adapter_save_nothing():
    """They are of the same kind as frozen layers behind it, which do."""
    model = make_model("mistral", make_tokenizer())
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers = 3
    model.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    model = checkpointed(model)
    kept = KeptLayers(model, lambda tokens: 1e9)
    with kept:
        for length in (12, 20, 40, 40):
            ids = torch.randint(3, 40, (2, length))
            model(ids, labels=ids, use_cache=False).loss.backward()
        first, middle, last = kept.stacks[0].rates
    assert first is last and last is not middle
    assert last.bytes(40, 20) > 40 * 48 * 4  # more than one tensor as wide as the hidden states


def test_whether_anything_is_recomputed():
    model = make_model("mistral", make_tokenizer())
    assert not is_checkpointed(model)
    assert is_checkpointed(checkpointed(model))


def test_layers_of_two_stacks_share_the_budget():
    model = small_model("t5")
    kept = KeptLayers(model, lambda tokens: 1e9)
    ids = torch.randint(3, 40, (2, 9))
    expected = gradients(model, ids)
    with kept:
        for _ in range(3):
            found = gradients(model, ids)
    assert len(kept.stacks) == 2 and sum(stack.share for stack in kept.stacks) == 1.0
    assert kept.kept_layers == kept.layers
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_without_such_layers(caplog):
    kept = KeptLayers(torch.nn.Sequential(torch.nn.Linear(2, 2)), lambda tokens: 1e9)
    assert not kept.apply()
    assert "no layer of Sequential is a checkpointed GradientCheckpointingLayer" in caplog.text
    assert "activation_budget has no effect" in caplog.text
