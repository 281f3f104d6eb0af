"""Metrics of an evaluation are those of all pairs in one batch, whatever the batches and processes
are. The two processes run this file as a script."""

import sys
from pathlib import Path

import pytest

from oddsmith import ORPOConfig, ORPOTrainer
from support.engines import ENGINES, under
from support.processes import end, report, reports, two_processes
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

ROWS = 7
SIZES = (1, 2, 3, 4)
PREPARATION = "eval_model_preparation_time"
NOT_COMPARED = ("runtime", "per_second", PREPARATION, "epoch")
LOADERS = {
    "default": {},
    "dispatched": {"dispatch_batches": True},
    "split": {"split_batches": True},
    "not even": {"even_batches": False},
}


class Overridden(ORPOTrainer):
    """The plain path, with a loss that a hook changes."""

    def odds_ratio_loss(self, policy_chosen_logps, policy_rejected_logps):
        return super().odds_ratio_loss(policy_chosen_logps, policy_rejected_logps)


def held_out(kind):
    rows = pairs(ROWS, seed=8)
    if kind == "stream":
        return rows.to_iterable_dataset()
    if kind == "shards":  # more than processes, of different lengths
        return rows.to_iterable_dataset(num_shards=3)
    return rows


def trainer_for(folder, loader="default", trainer=ORPOTrainer, **changed):
    tokenizer = make_tokenizer()
    args = arguments(
        folder, accelerator_config=LOADERS[loader], remove_unused_columns=False, **changed
    )
    return trainer(
        model=make_model("qwen3_tied", tokenizer),
        args=ORPOConfig(**args),
        train_dataset=pairs(4),
        eval_dataset=held_out("map"),
        processing_class=tokenizer,
    )


def evaluate(trainer, kind, size):
    trainer.args.per_device_eval_batch_size = size
    metrics = trainer.evaluate(None if kind == "map" else held_out(kind))
    # What evaluate makes of the count is only in the speed.
    rows = round(metrics["eval_runtime"] * metrics["eval_samples_per_second"])
    return {**metrics, "rows": rows}


CASES = {
    "default": [
        *((kind, size) for kind in ("map", "stream") for size in SIZES),
        ("shards", 2),
    ],
    "split": [("map", 4), ("stream", 4)],
    "dispatched": [("map", 2), ("stream", 2)],
    "not even": [("map", 3), ("stream", 3)],
}


def main(folder):
    results = {}
    for loader, cases in CASES.items():
        trainer = trainer_for(folder, loader)
        results |= {f"{loader} {case}": evaluate(trainer, *case) for case in cases}
    results |= split_model(folder)
    results["overridden"] = evaluate(trainer_for(folder, trainer=Overridden), "map", 2)
    report(folder, results)


def split_model(folder):
    """Under FSDP2, where all processes need as many batches; a step without a learning rate splits it."""
    engine = ENGINES["FSDP2 by arguments"]
    with under(engine):
        trainer = trainer_for(folder, max_steps=1, learning_rate=0.0, **engine.arguments)
        trainer.train()
        return {
            f"FSDP2 {case}": evaluate(trainer, *case)
            for case in [("map", 1), ("map", 2), ("stream", 3), ("shards", 2)]
        }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All rows in one batch of one process."""
    return evaluate(trainer_for(tmp_path_factory.mktemp("one")), "map", ROWS)


def check(metrics, whole):
    assert set(metrics) ^ set(whole) <= {PREPARATION}  # not of a model that was trained
    for name, value in whole.items():
        if not any(part in name for part in NOT_COMPARED):
            assert metrics[name] == pytest.approx(value, rel=2e-6, abs=1e-6), name


def test_one_process(whole, tmp_path):
    trainer = trainer_for(tmp_path)
    for kind, size in CASES["default"]:
        check(evaluate(trainer, kind, size), whole)


def test_one_process_from_logits(whole, tmp_path):
    trainer = trainer_for(tmp_path, trainer=Overridden)
    for size in (2, ROWS):
        check(evaluate(trainer, "map", size), whole)


def test_two_processes(whole, tmp_path):
    two_processes(__file__, tmp_path)
    first, second = reports(tmp_path)
    for case, metrics in first.items():
        check(metrics, whole)
        check(second[case], whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end()
