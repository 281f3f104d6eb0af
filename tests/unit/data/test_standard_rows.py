"""The rows that a dataset shows, in the trainer's columns."""

import pytest
from datasets import Dataset, IterableDataset

from oddsmith.data.standard_rows import shown_rows, standard_rows, unused_text
from support.word_tokenizer import bot, user

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c", "other": 1} for _ in range(3)]
ORCA = [
    {"system": "Be brief.", "question": f"q {i}", "chosen": "b", "rejected": "c", "source": "x"}
    for i in range(3)
]


def louder(batch):
    return {**batch, "chosen": [text + "!" for text in batch["chosen"]]}


@pytest.mark.parametrize("how", ["with_transform", "set_transform"])
def test_a_transform_is_applied(how):
    dataset = Dataset.from_list(ROWS)
    shown = getattr(dataset, how)(louder) or dataset
    assert shown_rows(shown).to_list() == [{**row, "chosen": "b!"} for row in ROWS]


def test_a_transform_can_make_the_columns():
    dataset = Dataset.from_dict({"id": [0, 1]}).with_transform(
        lambda batch: {
            name: [f"{name} {i}" for i in batch["id"]] for name in ("chosen", "rejected")
        }
    )
    assert shown_rows(dataset)[1] == {"chosen": "chosen 1", "rejected": "rejected 1"}


def test_columns_that_a_format_hides_are_not_there():
    hidden = Dataset.from_list(ROWS).with_format("torch", columns=["chosen", "rejected"])
    assert shown_rows(hidden)[0] == {"chosen": "b", "rejected": "c"}
    assert shown_rows(Dataset.from_list(ROWS).with_format("torch"))[0] == ROWS[0]


@pytest.mark.parametrize("stream", [False, True])
def test_recognised_columns(stream, log):
    dataset = Dataset.from_list(ORCA)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    made = list(standard_rows(dataset, {}, "rows"))
    assert made[2] == {
        "source": "x",
        "prompt": [{"role": "system", "content": "Be brief."}, user("q 2")],
        "chosen": [bot("b")],
        "rejected": [bot("c")],
    }
    assert "rows: system and question are the prompt; column_mapping names other" in log.text


@pytest.mark.parametrize("stream", [False, True])
def test_named_columns(stream, log):
    rows = [{**row, "prompt": "old"} for row in ORCA]
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    made = list(standard_rows(dataset, {"question": "prompt"}))
    assert made[1]["prompt"] == "q 1" and made[1]["chosen"] == "b"
    assert "question" not in made[1] and made[1]["system"] == "Be brief."
    assert not log.records


def test_the_trainers_columns_stay_as_they_are():
    dataset = Dataset.from_list(ROWS)
    assert standard_rows(dataset, {}) is dataset
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    assert standard_rows(stream, {}) is stream


def test_unused_text():
    row = {
        "prompt": "one two",
        "chosen": "b c",
        "rejected": "d",
        "question": "one two",  # is in the prompt
        "system": "be very brief",
        "source": "web",  # one word is a name
        "turns": [user("f g")],
        "score": 3.0,
        "tools": "a text of tools",
    }
    assert unused_text([row, {**row, "system": None}]) == ("system", "turns")
