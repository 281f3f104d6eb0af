"""Complete runs with GaLore and APOLLO: learning, resuming after a kill, two processes.

Run as a script this file is what the processes of a test run.
"""

import functools
import sys

import pytest
import torch
from transformers import TrainerCallback

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.demo.model import build_model, train_tokenizer
from oddsmith.demo.tasks import make_pairs
from oddsmith.optim.low_rank.galore import optimizer_bytes
from oddsmith.training.low_rank_names import LOW_RANK_NAMES
from support import optim_runs
from support.optim_runs import (
    SAVED,
    Kill,
    check_same_end,
    checkpoint,
    killed_run,
    sums,
    weights,
)
from support.processes import end, report, reports, two_processes
from support.trainer_runs import long_pairs, pairs, train, train_logs

ARTICLE = [r".*attn.*", r".*mlp.*"]
NAMES = sorted(LOW_RANK_NAMES)
# Refreshes at 0 and 3, and the next at 6, after the checkpoint.
GALORE = {
    "optim": "galore_adamw",
    "optim_target_modules": ARTICLE,
    "optim_args": "rank=6,update_proj_gap=3",
}
run = functools.partial(optim_runs.run, **GALORE)


@pytest.mark.parametrize("name", NAMES)
def test_resumes_bit_for_bit(name, tmp_path):
    through = run(tmp_path / "through", optim=name)
    saved = checkpoint(tmp_path / "through")
    state = torch.load(f"{saved}/optimizer.pt", weights_only=True)["state"]
    assert {state[key]["step"] for key in state} == {SAVED}
    check_same_end(run(tmp_path / "resumed", resume=saved, optim=name), through)


def test_resumes_after_a_kill(tmp_path):
    name = "galore_adamw_8bit_layerwise"
    saved = killed_run(__file__, tmp_path / "killed", name)
    through = run(tmp_path / "through", optim=name)
    check_same_end(run(tmp_path / "resumed", resume=saved, optim=name), through)


@pytest.mark.parametrize(
    "name", ["galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"]
)
def test_layerwise_is_the_same_run(name, tmp_path):
    """Two micro-batches per update, and the last update of an epoch has one."""
    rows = pairs(10)
    options = {"max_grad_norm": 0.0, "max_steps": 6, "save_strategy": "no", "rows": rows}
    plain = run(tmp_path, optim=name, **options)
    layerwise = run(tmp_path, optim=f"{name}_layerwise", **options)
    assert layerwise.optimizer.optimizer.layerwise
    assert all(p.grad is None for p in layerwise.model.parameters())
    for one, other in zip(train_logs(plain), train_logs(layerwise), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-4)
        assert other["grad_norm"] > 0
    for key, weight in weights(plain).items():
        torch.testing.assert_close(weights(layerwise)[key], weight, rtol=1e-3, atol=2e-3, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_margins_rise(name, tmp_path):
    options = {"max_steps": 30, "learning_rate": 5e-3, "save_strategy": "no", "logging_steps": 5}
    if name.startswith("apollo"):
        options["optim_args"] = "rank=6,update_proj_gap=10,scale=4"
    trainer = run(tmp_path, optim=name, rows=pairs(8), **options)
    first, *_, last = train_logs(trainer)
    assert last["rewards/margins"] > first["rewards/margins"]
    assert last["loss"] < 0.9 * first["loss"]


def test_memory_is_that_of_the_formula(tmp_path):
    trainer = run(tmp_path, max_steps=1, save_strategy="no")
    expected = 0
    for name, p in trainer.model.named_parameters():
        if "attn" in name or "mlp" in name:
            small, large = sorted(p.shape)
            expected += small * 6 + 2 * large * 6
        else:
            expected += 2 * p.numel()
    assert optimizer_bytes(trainer.optimizer.optimizer) == 4 * expected


def final_loss(folder, svd):
    """The evaluation loss after 300 steps of full-parameter training from scratch."""
    rows = make_pairs(1_200, seed=4)
    texts = [message["content"] for row in rows for message in row["prompt"] + row["chosen"]]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(5)
    model = build_model(tokenizer, hidden_size=48, num_hidden_layers=2)
    from datasets import Dataset

    args = optim_runs.config(
        folder, **GALORE | {"optim_args": f"rank=8,update_proj_gap=50,svd={svd}"}, max_steps=300, save_strategy="no", per_device_train_batch_size=8,
        gradient_accumulation_steps=1, logging_steps=50, learning_rate=1e-2, beta=0.1,
        warmup_steps=20,
    )  # fmt: skip
    trainer = train(
        ORPOTrainer, ORPOConfig, model, tokenizer, Dataset.from_list(rows[:1_100]), args,
        eval_dataset=Dataset.from_list(rows[1_100:]),
    )  # fmt: skip
    return train_logs(trainer)[0]["loss"], trainer.evaluate()["eval_loss"]


def test_a_random_basis_is_as_good(tmp_path):
    first, exact = final_loss(tmp_path, "exact")
    _, random = final_loss(tmp_path, "random")
    assert exact < 0.8 * first  # it has learnt something
    assert random == pytest.approx(exact, rel=5e-3)


def test_two_processes_equal_one(tmp_path):
    """Rows of one length: the mean over a large batch is the mean of the means of its halves."""
    two_processes(__file__, "two", tmp_path)
    results = reports(tmp_path)
    for name in ("galore_adamw", "galore_adamw_8bit", "apollo_adamw"):
        assert results[0][name] == results[1][name]  # to the bit
        alone = distributed_run(tmp_path, name, per_device_train_batch_size=4)
        for key, value in sums(alone).items():
            assert results[0][name][key] == pytest.approx(value, rel=1e-3, abs=5e-3), key
    assert "would come before the gradients are averaged" in results[0]["layerwise"]


class Record(TrainerCallback):
    """Weights and 8-bit codes of moments after each step."""

    def __init__(self):
        self.weights, self.codes = [], []

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        states = getattr(optimizer, "optimizer", optimizer).state
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.codes.append(
            {
                (name, key): value.clone().int()
                for name, p in model.named_parameters()
                for key, value in states[p].items()
                if torch.is_tensor(value) and value.dtype == torch.uint8
            }
        )


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit"])
def test_one_batch_is_its_micro_batches(name, tmp_path):
    """
    Gradients are rounded in another way, and that stays small: no basis and no sign changes with it.
    With 8 bits a moment that lies between two codes gets the other one. It is one code off, and its
    weight a part of a step, as with `adamw_8bit`: measured were one of all codes, of the head, which
    is not projected, and 2.4e-4 for its weight.
    """
    batch, micro = Record(), Record()
    options = {"learning_rate": 1e-2, "max_steps": 4}
    distributed_run(tmp_path, name, callbacks=[batch], **options)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    distributed_run(tmp_path, name, callbacks=[micro], **options, **sizes)
    other_codes = set()
    for step in range(4):
        for key, codes in batch.codes[step].items():
            off = (codes - micro.codes[step][key]).abs()
            assert off.max() <= 1, key
            # Few of all: a wrong gradient would change most.
            assert off.sum() <= 1 + codes.numel() // 1000, key
            if off.any():
                other_codes.add(key[0])
        for key, weight in batch.weights[step].items():
            error = (weight - micro.weights[step][key]).abs().max()
            # The other weights see the one that is off.
            others = 1e-4 if other_codes else 1e-5
            assert error < (2e-3 if key in other_codes else others), (step, key)


def distributed_run(folder, name, **changed):
    options = {
        "max_length": 24, "gradient_accumulation_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 2, "max_steps": 5,
    }  # fmt: skip
    return run(folder, optim=name, rows=long_pairs(24), **{**options, **changed})


def two(folder):
    results = {}
    for name in ("galore_adamw", "galore_adamw_8bit", "apollo_adamw"):
        trainer = distributed_run(folder, name)
        assert trainer.accelerator.num_processes == 2
        results[name] = sums(trainer)
    try:
        distributed_run(folder, "galore_adamw_layerwise")
    except NotImplementedError as error:
        results["layerwise"] = str(error)
    report(folder, results)


if __name__ == "__main__":
    if sys.argv[1] == "two":
        two(sys.argv[2])
        end()
    else:
        run(sys.argv[2], optim=sys.argv[3], callbacks=[Kill()])
