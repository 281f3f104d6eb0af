"""Rows are tokenised by one process of a node. The two processes run this file as a script."""

import os
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import Dataset

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training import shared_rows
from oddsmith.training.shared_rows import once_per_node
from support.processes import end, report, reports, two_processes
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs


class Counting(ORPOTrainer):
    """Rows by a hook, which counts them."""

    calls = 0

    def tokenize_row(self, feature, model=None):
        Counting.calls += 1
        return super().tokenize_row(feature, model)


def prepared(folder, kind, rows, **config):
    tokenizer = make_tokenizer()
    return kind(
        model=make_model("qwen3_tied", tokenizer),
        args=ORPOConfig(**arguments(folder, **config)),
        train_dataset=rows,
        eval_dataset={"a": rows.select(range(3)), "b": rows.to_iterable_dataset()},
        processing_class=tokenizer,
    )


def ids(dataset):
    return [row["chosen_input_ids"] for row in dataset]


def failing():
    if PartialState().is_local_main_process:
        time.sleep(0.5)
        raise ValueError("row 3 is faulty")
    raise AssertionError("the rows are made by the other process")


def unpicklable():
    rows = pairs(2)
    if PartialState().is_local_main_process:
        rows.unpicklable = lambda: None
        rows.save_to_disk = None
    return rows


def results(folder):
    found = {}
    for name, kind in (("hook", Counting), ("own", ORPOTrainer)):
        trainer = prepared(folder, kind, pairs(9), overlength="drop", max_length=90)
        found[name] = [ids(trainer.train_dataset), ids(trainer.eval_dataset["a"])]
        found[f"{name} evaluated"] = trainer.evaluate(pairs(4, seed=2))["eval_loss"]
    return {**found, "calls": Counting.calls}


def main(folder):
    found = results(folder)
    trainer = prepared(folder, ORPOTrainer, pairs(9))
    found["mapped"] = bool(trainer.train_dataset.cache_files)
    try:
        once_per_node(failing)
    except ValueError as error:
        found["error"] = str(error)
    found["unpicklable"] = len(once_per_node(unpicklable))
    report(folder, found)


def test_two_processes(tmp_path):
    alone = results(tmp_path / "alone")
    cache = tmp_path / "cache"
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    try:
        two_processes(__file__, tmp_path)
    finally:
        del os.environ["HF_DATASETS_CACHE"]
    first, second = reports(tmp_path)
    for name in ("hook", "own"):
        assert first[name] == second[name] == alone[name]
        assert first[f"{name} evaluated"] == second[f"{name} evaluated"]
    # The second one reads only the 9 rows of the stream: when they are prepared, and when their ids
    # are checked.
    assert first["calls"] == alone["calls"] and second["calls"] == 2 * 9
    assert second["mapped"]  # from the file of the other process
    assert first["error"] == second["error"] == "row 3 is faulty"
    assert first["unpicklable"] == second["unpicklable"] == 2


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_nobody_else_can_write_what_is_unpickled(umask, tmp_path):
    before = os.umask(umask)
    try:
        shared_rows._Maker(tmp_path / "rows").make(lambda: Dataset.from_list([{"a": 1}]))
    finally:
        os.umask(before)
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o700


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end()
