"""Routers that peft takes for linear layers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from oddsmith.integrations.router_layers import adapted_router, without_routers
from support.packed_models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**options):
    return LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": "all-linear", **options})


@pytest.mark.parametrize("family", ["Llama4Text", "Phimoe"])
def test_all_linear_layers_but_routers(family):
    config = lora(exclude_modules=["k_proj"])
    changed = without_routers(tiny(family), config)
    assert changed.exclude_modules == ["k_proj", "router"]
    assert set(config.exclude_modules) == {"k_proj"}
    model = get_peft_model(tiny(family), without_routers(tiny(family), lora()))
    assert adapted_router(model) is None
    model(input_ids=torch.arange(3, 9)[None])
    named = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert any("q_proj" in name for name in named) and not any("router" in name for name in named)


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["router"]),  # what is asked for by name stays
        lora(exclude_modules=["router"]),
        lora(exclude_modules=".*router"),
    ],
)
def test_other_configurations_are_left_alone(config):
    assert without_routers(tiny("Llama4Text"), config) is config


def test_models_without_routers_are_left_alone():
    config = lora()
    assert without_routers(tiny("Llama"), config) is config
    assert without_routers(tiny("Mixtral", num_local_experts=2), config) is config


def test_a_router_with_an_adapter_is_found():
    model = get_peft_model(tiny("Llama4Text"), lora(target_modules=["router", "q_proj"]))
    assert adapted_router(model).endswith("feed_forward.router")
    assert adapted_router(nn.Linear(2, 2)) is None
