"""Rows are tokenised by one process of a node. The two processes run this file as a script."""

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import Dataset

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training import life_signs, shared_rows
from oddsmith.training.shared_rows import once_per_node
from support.processes import end, ended, report, reports, two_processes
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
    found["containers"] = from_two_folders(folder)
    report(folder, found)


def from_two_folders(folder):
    """As in two containers: neither sees the files of the other one."""
    own = folder / os.environ["RANK"]
    (own / "cache").mkdir(parents=True)
    shared_rows.datasets.config.HF_DATASETS_CACHE = own / "cache"
    shared_rows.tempfile.tempdir = str(own)
    life_signs.START = 1.0
    said = []
    shared_rows.logger.warning = said.append
    rows = once_per_node(lambda: pairs(9))
    return [rows["chosen"][:], ["prepares the rows too" in line for line in said]]


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
    assert first["containers"] == [pairs(9)["chosen"][:], []]
    assert second["containers"] == [pairs(9)["chosen"][:], [True]]


# ---- A process that makes no rows, or whose rows cannot be read ----


def killed():
    if PartialState().is_local_main_process:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("the rows are made by the other process")


def main_of_a_killed(folder):
    with pytest.raises(RuntimeError) as raised:
        once_per_node(killed)
    report(folder, str(raised.value))


def test_a_process_that_is_killed_while_it_makes_rows(tmp_path):
    code, errors = ended(["-m", "support.forked", __file__, tmp_path, "killed"], timeout=300)
    assert code == 1
    said = json.loads((tmp_path / "1.json").read_text())
    assert "the main process of this node (process id" in said, errors[-4000:]
    assert said.endswith(") ended while it prepared the rows")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(shared_rows.logger, "warning", lines.append)
    return lines


def test_rows_whose_files_are_elsewhere(tmp_path, said):
    pairs(3).save_to_disk(tmp_path / "rows")
    stored = pickle.dumps(Dataset.load_from_disk(str(tmp_path / "rows")))
    (tmp_path / "rows").rename(tmp_path / "others")
    (tmp_path / "result").write_bytes(stored)
    assert shared_rows._wait(tmp_path) is None
    assert "cannot be read, so this process prepares them too" in said[0]


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_rows.tempfile, "tempdir", str(tmp_path))
    missing = tmp_path / "missing" / "rows-1"
    assert len(shared_rows._Maker(missing).make(lambda: pairs(2))) == 2
    assert shared_rows._wait(missing) is None
    monkeypatch.setattr(shared_rows.tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(RuntimeError, match="can be written to.*set HF_DATASETS_CACHE or TMPDIR"):
        shared_rows._Maker(missing).make(lambda: pairs(2))


def test_a_result_that_cannot_be_written(tmp_path, monkeypatch, said):
    """As on a full disk: the others end too, and do not wait."""

    def full(self, result):
        raise OSError("no space left")

    monkeypatch.setattr(shared_rows._Maker, "_say", full)
    monkeypatch.setattr(shared_rows, "_PAUSE", 0.01)
    maker = shared_rows._Maker(tmp_path / "rows-1")
    with pytest.raises(OSError, match="no space left"):
        maker.make(lambda: pairs(2))
    assert "cannot be shared" in said[0]
    watch = life_signs.Watch(maker.folder / "maker")
    watch.silence()
    watch._locked = True  # as another process has seen it
    assert watch.silence() == "ended"


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_nobody_else_can_write_what_is_unpickled(umask, tmp_path):
    before = os.umask(umask)
    try:
        shared_rows._Maker(tmp_path / "rows").make(lambda: Dataset.from_list([{"a": 1}]))
    finally:
        os.umask(before)
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o700


if __name__ == "__main__":
    PartialState(cpu=True)
    (main_of_a_killed if sys.argv[-1] == "killed" else main)(Path(sys.argv[1]))
    end()
