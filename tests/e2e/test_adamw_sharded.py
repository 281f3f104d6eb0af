"""AdamW8bit on parameters that FSDP2 has split over two processes, on the CPU.

Run as a script this file is what the processes run.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from oddsmith.optim import AdamW8bit, PagedAdamW8bit
from oddsmith.optim.adamw.saved_state import unwrap
from support.gradients import randn
from support.processes import end, report, reports, two_processes

RULE = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_model(split):
    """Rows that do not divide by two, one row, and parts on both sides of 4096 elements."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(70, 121), nn.Tanh(), nn.Linear(121, 63), nn.Linear(63, 1))
    if split:
        mesh = init_device_mesh("cpu", (2,))
        for module in [model[0], model[2], model]:
            fully_shard(module, mesh=mesh)
    return model


def train(model, optimizer, steps):
    for step in steps:
        loss = (model(randn(32, 70, seed=step)) - randn(32, 1, seed=99 + step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole_weights(model):
    weights = (each.detach() for each in model.parameters())
    return [
        each.full_tensor() if hasattr(each, "full_tensor") else each.clone() for each in weights
    ]


def check_steps(kind):
    """Blocks end at the ends of parts, so scales differ, and results agree up to the rounding of
    codes."""
    split, whole = make_model(True), make_model(False)
    start = whole_weights(whole)
    optimizer, peer = kind(split.parameters(), **RULE), AdamW8bit(whole.parameters(), **RULE)
    train(split, optimizer, range(8))
    train(whole, peer, range(8))
    for mine, theirs, before in zip(whole_weights(split), whole_weights(whole), start):
        moved = (theirs - before).norm()
        # A part below 4096 elements has 32 bits, the unsplit parameter 8.
        assert (mine - theirs).norm() < 0.1 * moved, tuple(mine.shape)
    dtypes = {state["state1"].dtype for state in optimizer.state.values()}
    assert dtypes == {torch.uint8, torch.float32}

    # With fp32 moments only, both are the same.
    exact, other = make_model(True), make_model(False)
    train(exact, kind(exact.parameters(), **RULE, optim_bits=32), range(8))
    train(other, AdamW8bit(other.parameters(), **RULE, optim_bits=32), range(8))
    for mine, theirs in zip(whole_weights(exact), whole_weights(other)):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def check_state(kind, folder):
    """Gathered, saved, loaded and split again, a run goes on bit for bit."""
    model = make_model(True)
    optimizer = kind(model.parameters(), **RULE)
    train(model, optimizer, range(4))
    kept = [each.to_local().clone() for each in model.parameters()]
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/optimizer.pt")
        first = state["state"]["0.weight"]
        assert first["step"] == 4
        assert first["state1"].shape == first["state2"].shape == (121, 70)
        assert first["state1"].dtype == torch.float32
    dist.barrier()
    train(model, optimizer, range(4, 7))

    again = make_model(True)
    resumed = kind(again.parameters(), **RULE)
    for weight, value in zip(again.parameters(), kept):
        weight.to_local().data.copy_(value)
    saved = torch.load(f"{folder}/optimizer.pt", weights_only=True)
    set_optimizer_state_dict(again, resumed, saved, options=StateDictOptions(full_state_dict=True))
    train(again, resumed, range(4, 7))
    for mine, theirs in zip(model.parameters(), again.parameters()):
        assert torch.equal(mine.to_local(), theirs.to_local()), tuple(mine.shape)
        ours, others = unwrap(optimizer.state[mine]), unwrap(resumed.state[theirs])
        assert ours.keys() == others.keys() and ours["step"] == others["step"] == 7
        assert all(torch.equal(ours[key], others[key]) for key in ours.keys() - {"step"})

    # The state of unsplit parameters, whose names are numbers, can be loaded too.
    gathered = [saved["state"][name] for name, _ in again.named_parameters()]
    whole = make_model(False)
    alone = AdamW8bit(whole.parameters(), **RULE)
    groups = alone.state_dict()["param_groups"]
    alone.load_state_dict({"state": dict(enumerate(gathered)), "param_groups": groups})
    assert all(each["step"] == 4 for each in alone.state.values())
    dist.barrier()


def two(folder):
    dist.init_process_group("gloo")
    for kind in (AdamW8bit, PagedAdamW8bit):
        check_steps(kind)
        check_state(kind, folder)
    dist.barrier()  # neither process ends while the other still needs it
    dist.destroy_process_group()
    report(folder, "all checked")


def test_split_parameters(tmp_path):
    two_processes(__file__, tmp_path)
    assert reports(tmp_path) == ["all checked"] * 2


if __name__ == "__main__":
    two(sys.argv[1])
    end()
