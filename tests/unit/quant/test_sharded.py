"""4-bit layers whose weights FSDP2 splits, in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from oddsmith.integrations.peft_merge import in_full
from oddsmith.nn import Linear4bit
from oddsmith.quant.sharded import without_entries
from support.gradients import randn

ENTRIES = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]
WHOLE = StateDictOptions(full_state_dict=True)


def make_model(storage=torch.float32, seed=3, **options):
    layers = [nn.Linear(64, 48, bias=False), nn.Linear(48, 64)]
    for place, layer in enumerate(layers):
        layer.weight.data = randn(*layer.weight.shape, seed=seed + place)
        if layer.bias is not None:
            layer.bias.data = randn(64, seed=seed)
    layers = [Linear4bit.from_linear(each, quant_storage=storage, **options) for each in layers]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def split(model, mesh, **options):
    return fully_shard(model, mesh=mesh, **options)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_state_dict_in_one_process(storage, compress_statistics):
    model = make_model(storage, compress_statistics=compress_statistics)
    found = get_model_state_dict(model)
    assert list(found) == list(model.state_dict())
    assert sum("nested" in name for name in found) == (4 if compress_statistics else 0)
    other = make_model(storage, seed=8, compress_statistics=compress_statistics)
    set_model_state_dict(other, found)
    x = randn(3, 64, seed=1)
    assert torch.equal(other(x), model(x))


def test_a_weight_has_the_entries_of_its_state():
    weight = make_model()[0].weight
    state = weight.quant_state
    found = [getattr(weight, name) for name in ENTRIES]
    expected = [state.absmax, state.code, state.state2.absmax, state.state2.code]
    assert all(one is other for one, other in zip(found, expected, strict=True))
    plain = make_model(compress_statistics=False)[0].weight
    assert [hasattr(plain, name) for name in ENTRIES] == [True, True, False, False]
    empty = Linear4bit(64, 2).weight
    assert not any(hasattr(empty, name) for name in ENTRIES)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_the_same_results_and_gradients(mesh, storage):
    model, whole = make_model(storage), make_model(storage)
    split(model[0], mesh)
    split(model, mesh)
    assert all(hasattr(layer.weight, "device_mesh") for layer in (model[0], model[2]))
    for _ in range(2):  # gathered again
        x, y = (randn(3, 64, seed=1).requires_grad_() for _ in range(2))
        model(x).square().sum().backward()
        whole(y).square().sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert torch.equal(model[2].bias.grad.full_tensor(), whole[2].bias.grad)


def test_a_state_dict_of_split_weights(mesh):
    model = split(make_model(), mesh)
    found = get_model_state_dict(model, options=WHOLE)
    expected = make_model().state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())

    other = split(make_model(seed=8), mesh)
    set_model_state_dict(other, found, options=WHOLE)
    again = get_model_state_dict(other, options=WHOLE)
    assert all(torch.equal(value, expected[name]) for name, value in again.items())
    x = randn(3, 64, seed=1)
    assert torch.equal(other(x), make_model()(x))


def test_what_a_split_weight_cannot_load(mesh):
    model = split(make_model(), mesh)
    found = make_model().state_dict()
    full = {**found, "0.weight": randn(48, 64)}
    plain = {name: value for name, value in full.items() if not name.startswith("0.weight.")}
    with pytest.raises(RuntimeError, match=r"codes are float32 \(48, 64\)"):
        model.load_state_dict(plain)
    with pytest.raises(
        RuntimeError, match=r"codes are float32 \(48, 64\); must be float32 \(384, 1\)"
    ):
        model.load_state_dict(full)
    other = make_model()[2].state_dict()
    wrong = {f"0.{name}": value for name, value in other.items() if name != "bias"}
    with pytest.raises(RuntimeError, match=r"shape is .*; must be \(48, 64\)"):
        model.load_state_dict(wrong, strict=False)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_codes_without_their_state(storage, mesh):
    """torch fills what a partial state dict lacks with the model's own codes."""
    model = make_model(storage)
    if storage.is_floating_point:
        split(model, mesh)
    x = randn(3, 64, seed=1)
    expected = model(x)
    codes = {"0.weight": model.state_dict()["0.weight"]}
    assert "0.weight.quant_state.bitsandbytes__nf4" in model.load_state_dict(codes, strict=False)[0]
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(codes)
    bias = {"2.bias": randn(64, seed=9)}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(bias), options=options)
    assert torch.allclose(model(x), expected - make_model()[2].bias + bias["2.bias"], atol=1e-5)


def test_state_dicts_without_entries():
    model = make_model()
    with without_entries():
        assert list(model.state_dict()) == ["0.weight", "2.weight", "2.bias"]
    assert len(model.state_dict()) == 3 + 2 * 5


def test_codes_are_not_cast(mesh):
    model = split(make_model(), mesh)
    before = get_model_state_dict(model, options=WHOLE)["0.weight"].clone()
    model.bfloat16()
    assert model[0].weight.dtype == torch.float32 and model[2].bias.dtype == torch.bfloat16
    assert torch.equal(get_model_state_dict(model, options=WHOLE)["0.weight"], before)
    model.to("cpu")
    assert model[0].weight.quant_state is not None
    model[2].bias.data = model[2].bias.data.float()
    assert model(randn(3, 64, seed=1)).isfinite().all()

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    cast = split(make_model(), mesh, mp_policy=policy)
    with pytest.raises(RuntimeError, match="FSDP2 must not cast codes"):
        cast(randn(3, 64))


def test_a_split_weight_is_not_merged(mesh):
    model = split(make_model(), mesh)
    with (
        pytest.raises(RuntimeError, match="split over processes; save the adapter"),
        in_full(model[0]),
    ):
        pass
