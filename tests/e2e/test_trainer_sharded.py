"""The fused head in a model that FSDP has split over two processes, on the CPU.

Run as a script this file is what the processes run: a sharded model's loss and gradients against
those of an unsharded one, averaged over the processes.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn

from oddsmith.integrations.model_head import FusedBatch, fused_loss
from oddsmith.integrations.model_head import check as check_head
from support.processes import end, report, reports, two_processes
from support.trainer_runs import make_model, make_tokenizer


def fsdp2(model, head_apart):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    units = [*model.model.layers, *([model.lm_head] if head_apart else [])]
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh)
    yield model
    for name, parameter in model.named_parameters():
        yield name, parameter.grad.full_tensor()


def fsdp1(model, head_apart):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    units = {type(model.model.layers[0]), *([nn.Linear] if head_apart else [])}
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(units),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    yield sharded
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        for name, parameter in sharded.named_parameters():
            yield name.replace("_fsdp_wrapped_module.", ""), parameter.grad


def check(shard, model, head_apart):
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, 100, (4, 12), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(ids)
    mask[1, 9:], labels[1, 9:] = 0, -100
    objective = {"nll_scope": "full", "odds_ratio_link": "logsigmoid", "logits_budget": None}
    batch = FusedBatch.build(ids, mask, labels, beta=0.5, **objective)
    check_head(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    whole = copy.deepcopy(model)
    expected = fused_loss(whole, batch, **inputs).loss
    expected.backward()
    grads = {name: p.grad for name, p in whole.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= 2

    steps = shard(model, head_apart)
    loss = fused_loss(next(steps), batch, **inputs).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    found = dict(steps)
    assert set(found) == set(grads)
    for name, grad in found.items():
        error = (grad - grads[name]).abs().max().item()
        assert error < 1e-5, f"{name} is {error:.2e} off"


def main(folder):
    dist.init_process_group("gloo")
    tokenizer = make_tokenizer()
    for shard in (fsdp2, fsdp1):
        check(shard, make_model("mistral", tokenizer), head_apart=False)
        check(shard, make_model("mistral", tokenizer), head_apart=True)
    check(fsdp2, make_model("qwen3_tied", tokenizer), head_apart=False)
    dist.barrier()  # neither process ends while the other still needs it
    dist.destroy_process_group()
    report(folder, "all checked")


def test_sharded_models(tmp_path):
    two_processes(__file__, tmp_path)
    assert reports(tmp_path) == ["all checked"] * 2


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
