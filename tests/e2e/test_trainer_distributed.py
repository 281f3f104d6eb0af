"""Two processes under torchrun give the same results as one. The processes run this file as a
script."""

import json
import sys
from pathlib import Path

import pytest

from oddsmith import ORPOConfig, ORPOTrainer
from support.processes import end, two_processes
from support.trainer_runs import (
    arguments,
    long_pairs,
    make_model,
    make_tokenizer,
    pairs,
    train,
)

NOT_COMPARED = ("runtime", "per_second", "total_flos")


def run(output_dir, case, **changed):
    """Trains, and returns the history and sums of the weights."""
    tokenizer = make_tokenizer()
    model = make_model("qwen3_tied", tokenizer)
    config = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}
    if case == "whole batches":
        # Rows of one length: the mean over a large batch is the mean of the means of its halves.
        config |= {"max_length": 24, "gradient_accumulation_steps": 1}
        rows, held_out = long_pairs(24), long_pairs(4, seed=8)
    else:
        rows, held_out = pairs(24), pairs(5, seed=8)  # the last pair is only on one process
        config |= {"per_device_train_batch_size": 1}
    if case == "stream":
        rows, held_out = rows.to_iterable_dataset(), None
        config |= {"eval_strategy": "no"}
    if case == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        config |= {"ddp_find_unused_parameters": True}
    else:
        peft_config = None
    args = arguments(output_dir, **{**config, **changed})
    kwargs = {"eval_dataset": held_out, "peft_config": peft_config}
    trainer = train(ORPOTrainer, ORPOConfig, model, tokenizer, rows, args, **kwargs)
    sums = {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}
    return trainer, {"history": trainer.state.log_history, "sums": sums}


# One process takes the batches of two one after the other, or both at once.
ALONE = {
    "accumulated": {"gradient_accumulation_steps": 4, "per_device_eval_batch_size": 2},
    "whole batches": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2},
    "stream": {"gradient_accumulation_steps": 4},
    "lora": {"gradient_accumulation_steps": 4, "per_device_eval_batch_size": 2},
}


def main(output_dir):
    for case in ALONE:
        trainer, result = run(Path(output_dir), case)
        assert trainer._plain_because is None
        assert trainer.accelerator.num_processes == 2
        if trainer.is_world_process_zero():
            (Path(output_dir) / f"{case}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def results_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, folder)
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in ALONE}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", list(ALONE))
def test_two_processes_equal_one(case, tmp_path, results_of_two):
    two = results_of_two[case]
    _, one = run(tmp_path, case, **ALONE[case])
    assert len(one["history"]) == len(two["history"])
    for mine, other in zip(one["history"], two["history"], strict=True):
        assert set(mine) == set(other)
        for name, value in mine.items():
            if any(part in name for part in NOT_COMPARED):
                continue
            assert other[name] == pytest.approx(value, rel=1e-5, abs=2e-6), (mine["step"], name)
    assert two["sums"] == pytest.approx(one["sums"], rel=1e-5, abs=1e-4)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
