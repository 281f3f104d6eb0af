"""Parts of split parameters and their moments; tests/e2e/test_adamw_sharded.py trains with two processes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from oddsmith.optim.adamw.fsdp import gathered, local, local_grad, split
from oddsmith.optim.adamw.moments import decode, encode
from support.gradients import randn


@pytest.fixture
def mesh():
    """A mesh of one process, with tensors split as in larger ones."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_whole_parameters_are_left_alone():
    weight = torch.nn.Parameter(randn(3, 4))
    assert local(weight) is weight
    assert gathered(weight, {"step": 1}) is None
    moment = torch.ones(3, 4)
    assert split(weight, moment) is moment
    assert split(weight, 7) == 7


@pytest.mark.parametrize("bits", [8, 32])
def test_moments_are_split_as_their_parameter(mesh, bits):
    weight = distribute_tensor(randn(6, 64), mesh, [Shard(0)])
    first, second = randn(6, 64, seed=1), randn(6, 64, seed=2).square()
    state = {"step": 3, "state1": first, "state2": second}
    if bits == 8:
        state = {"step": 3, **encode(first, second)}
    found = gathered(weight, state)
    assert found["step"] == 3
    for key, moment in zip(("state1", "state2"), decode(state)):
        assert isinstance(found[key], DTensor) and found[key].placements == weight.placements
        assert found[key].shape == weight.shape
        assert torch.equal(found[key].full_tensor(), moment)
    # Saved in full or split, a process gets its part.
    assert torch.equal(split(weight, first), first)
    assert torch.equal(split(weight, distribute_tensor(first, mesh, [Shard(0)])), first)
    # A tensor of another shape is not a full moment: it is kept.
    other = torch.ones(256)
    assert split(weight, other) is other
    assert torch.equal(local(weight), randn(6, 64))


def test_gradients_split_in_another_way_are_split_as_their_parameter(mesh):
    values = randn(6, 64, seed=1)
    for other in (Replicate(), Shard(1), Partial()):
        weight = torch.nn.Parameter(distribute_tensor(randn(6, 64), mesh, [Shard(0)]))
        weight.grad = DTensor.from_local(values, mesh, [other], run_check=False)
        # torch's setter and optimizers accept another placement, which local parts would hide.
        assert weight.grad.placements != weight.placements
        found = local_grad(weight)
        assert not isinstance(found, DTensor) and torch.equal(found, values)
    whole = torch.nn.Parameter(randn(3, 4))
    whole.grad = randn(3, 4, seed=2)
    assert local_grad(whole) is whole.grad
