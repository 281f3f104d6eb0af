"""A model without its wrappers, and trial runs without side effects."""

import pytest
import torch
from torch import nn

from oddsmith.integrations.model_core import core_of, observed
from support.trainer_runs import make_model, make_tokenizer


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_wrappers_come_off():
    from peft import LoraConfig, get_peft_model

    model = make_model("mistral", make_tokenizer())
    assert core_of(model) is model
    assert core_of(nn.DataParallel(model)) is model
    assert core_of(torch.compile(model)) is model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert core_of(nn.DataParallel(adapted)) is model


def test_nothing_is_left_of_a_trial():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    state = torch.get_rng_state()
    with observed(model):
        x = torch.randn(3, 4)
        assert not model(x).requires_grad
        assert torch.equal(model[0](x), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [False, True, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    with pytest.raises(ZeroDivisionError), observed(model):
        1 / 0  # noqa: B018
    assert [module.training for module in model] == [False, True, True]


def test_a_trial_is_as_exact_as_the_weights():
    """Accelerate leaves its mixed precision around a model that was trained."""

    class Core(nn.Module):
        def forward(self, x):
            return x / 3

    core = Core()
    core._original_forward = core.forward
    core.forward = lambda x: (x / 3).bfloat16().float()
    wrapper, x = core.forward, torch.ones(1)
    with observed(core):
        assert core(x) == torch.tensor(1 / 3)
    assert core.forward is wrapper and core(x) != torch.tensor(1 / 3)
