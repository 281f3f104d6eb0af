"""What GaLore and APOLLO share: learning, gradients that are not finite, saved state, errors."""

import copy
import io
import math

import pytest
import torch

from oddsmith.optim.low_rank.apollo import APOLLOAdamW
from oddsmith.optim.low_rank.galore import GaLoreAdafactor, GaLoreAdamW
from support.low_rank import (
    CLASSES,
    backward,
    make_groups,
    make_model,
    make_optimizer,
    tensors_of,
    train,
    weights,
)

pytestmark = pytest.mark.usefixtures("eight_bits_for_all")


@pytest.mark.parametrize("name", list(CLASSES))
def test_it_learns(name):
    model = make_model()
    optimizer = make_optimizer(name, model)
    first = backward(model, 0).item()
    model.zero_grad()
    for _ in range(150):
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    assert backward(model, 0).item() < 0.3 * first


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_gradient_that_is_not_finite_changes_nothing(name, caplog):
    model = make_model()
    optimizer = make_optimizer(name, model)
    train(model, optimizer, 4)
    for bad in (math.nan, math.inf):
        backward(model, 4)
        model[0].weight.grad[3, 2] = bad
        model[2].bias.grad[1] = bad
        before, state = weights(model), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        optimizer.zero_grad()
        after = weights(model)
        for index, parameter in enumerate(model.parameters()):
            same = torch.equal(before[index], after[index])
            assert same == (parameter is model[0].weight or parameter is model[2].bias)
        kept = optimizer.state[model[0].weight]
        old = state["state"][2]
        assert kept["step"] == old["step"] == 4
        assert torch.equal(next(iter(tensors_of(kept))), next(iter(tensors_of(old))))
    assert optimizer.skipped == 4
    assert caplog.text.count("NaN or infinite") == 1


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(name, layerwise, dtype):
    model = make_model(dtype)
    optimizer = make_optimizer(name, model, layerwise=layerwise)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, start=4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make_model(dtype)
    again.load_state_dict(saved["model"])
    resumed = make_optimizer(name, again, layerwise=layerwise)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, start=4)
    assert all(map(torch.equal, weights(model), weights(again)))
    for parameter, other in zip(model.parameters(), again.parameters()):
        mine, theirs = optimizer.state[parameter], resumed.state[other]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert type(value) in (int, float, torch.Tensor), key
            same = torch.equal(value, theirs[key]) if torch.is_tensor(value) else None
            assert value == theirs[key] if same is None else same, key


@pytest.mark.parametrize("name", list(CLASSES))
def test_loading_copies(name):
    model, other = make_model(), make_model()
    optimizer, second = make_optimizer(name, model), make_optimizer(name, other)
    train(model, optimizer, 2)
    second.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    train(other, second, 2)
    after = optimizer.state_dict()["state"]
    for key, state in before.items():
        for mine, theirs in zip(tensors_of(state), tensors_of(after[key])):
            assert torch.equal(mine, theirs)


def broken(state_dict, change):
    state_dict = copy.deepcopy(state_dict)
    change(state_dict)
    return state_dict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["param_groups"].pop(), "has 1 parameter groups; must be 2"),
        (lambda s: s["param_groups"][1]["params"].pop(), "group 1 has 1 parameters; must be 2"),
        (lambda s: s["param_groups"][1].update(rank=4), "saved with rank 4; it is 5"),
        (lambda s: s["param_groups"][1].update(proj_type="full"), "saved with proj_type 'full'"),
        (lambda s: s["state"][2].update(exp_avg=torch.zeros(3)), r"exp_avg is \(3,\); must have"),
        (lambda s: s["state"][3].pop("basis_left"), "basis_left is None; must have shape"),
        (lambda s: s["state"][0].pop("exp_avg_sq"), "state of parameter 0: exp_avg_sq is None"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model, other = make_model(), make_model()
    optimizer, second = make_optimizer("adamw", model), make_optimizer("adamw", other)
    train(model, optimizer, 2)
    train(other, second, 1)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(broken(optimizer.state_dict(), change))
    after = second.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, state in before["state"].items():
        for mine, theirs in zip(tensors_of(state), tensors_of(after["state"][key])):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreAdafactor, APOLLOAdamW])
def test_a_matrix_smaller_than_the_rank_has_its_smaller_side_as_rank(kind, proj_type, caplog):
    options = {"scale_parameter": False, "relative_step": False} if kind is GaLoreAdafactor else {}
    results = []
    for rank in (128, 12):
        generator = torch.Generator().manual_seed(3)
        weight = torch.nn.Parameter(torch.randn(20, 12, generator=generator))
        group = {"params": [weight], "rank": rank, "proj_type": proj_type, "update_proj_gap": 2}
        optimizer = kind([group], lr=0.1, **options)
        for _ in range(3):
            weight.grad = torch.randn(20, 12, generator=generator)
            optimizer.step()
        results.append(weight.detach())
        optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(*results)
    (line,) = caplog.messages
    assert "rank is 128, more than a side of 1 of 1 matrices, such as (20, 12)" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; must be a positive integer"),
        ({"rank": 2.0}, "rank is 2.0; must be a positive integer"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"proj_type": "sideways"}, "proj_type is 'sideways'; must be one of"),
        ({"svd": "fast"}, "svd is 'fast'; must be one of"),
        ({"refresh_on": "last"}, "refresh_on is 'last'"),
        ({"overlap_threshold": 1.5}, "overlap_threshold is 1.5"),
        ({"gap": 3}, "unknown options gap"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_bad_options(options, message):
    model = make_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": matrices, "rank": 4, **options}])
    optimizer = GaLoreAdamW([model[0].bias])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": matrices, "rank": 4, **options})
    assert len(optimizer.param_groups) == 1


def test_other_bad_arguments():
    model = make_model()
    for kwargs, message in [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"max_grad_norm": 1.0}, "needs layerwise"),
        ({"layerwise": True, "accumulation_steps": 0}, "accumulation_steps is 0"),
        ({"seed": 1.5}, "seed is 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            GaLoreAdamW(make_groups(model), **kwargs)
    with pytest.raises(ValueError, match="only matrices, and stacks of them, can be projected"):
        GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}])
    with pytest.raises(ValueError, match="update_proj_gap without rank"):
        GaLoreAdamW([{"params": list(model.parameters()), "update_proj_gap": 4}])
    with pytest.raises(ValueError, match="give lr or relative_step=True"):
        GaLoreAdafactor(make_groups(model), lr=0.1)
    with pytest.raises(ValueError, match="proj_type is 'full'"):
        APOLLOAdamW(make_groups(model, proj_type="full"))
    with pytest.raises(ValueError, match="norm_growth is 0.5"):
        APOLLOAdamW(make_groups(model), norm_growth=0.5)
    model[0].weight.grad = torch.zeros(20, 12).to_sparse()
    with pytest.raises(ValueError, match="is sparse"):
        GaLoreAdamW(make_groups(model)).step()


def test_parameters_that_are_split_after_they_were_added():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}])
    weight.grad = torch.ones(8, 8)
    weight.device_mesh = "of FSDP2"
    with pytest.raises(ValueError, match="split over processes.*a projection needs full matrices"):
        optimizer.step()
