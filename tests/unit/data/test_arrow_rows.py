"""Arrow tables of a dataset: their text, and their columns of tokens."""

import pyarrow as pa
import pytest
from datasets import Dataset

from oddsmith.data.arrow_rows import prepare_table, sample_texts, text_source
from oddsmith.data.rows import RowBuilder
from oddsmith.data.rust_rows import FastRows
from support.word_tokenizer import TEMPLATE, WORDS, bot, user, word_tokenizer

A, B, C, D, E, F = range(3, 9)
ROWS = [
    {"prompt": "a ", "chosen": "b", "rejected": "c", "score": 1},
    {"prompt": "d ", "chosen": "e", "rejected": "f", "score": 2},
]


@pytest.fixture
def tokenizer():
    return word_tokenizer(chat_template=TEMPLATE)


def conversation(row):
    return {side: [user(row["prompt"]), bot(row[side])] for side in ("chosen", "rejected")}


def prepared(dataset, tokenizer, first=0):
    """The table of all rows from `first` on."""
    indices = list(range(first, len(dataset)))
    return prepare_table(
        dataset.select(indices).with_format("arrow")[:],
        indices,
        source=text_source(dataset),
        processing_class=tokenizer,
        fast=FastRows(RowBuilder(tokenizer, 20)),
        name="mine",
    )


def test_only_columns_of_text_are_read():
    dataset = Dataset.from_list([{**ROWS[0], "tools": "[]", "id": 7}]).with_format("torch")
    source = text_source(dataset)
    assert set(source.column_names) == {"prompt", "chosen", "rejected", "tools"}
    assert source[0]["prompt"] == "a "


def test_samples_are_spread_and_leave_out_faults(tokenizer):
    rows = [{"prompt": f"{letter} ", "chosen": "b", "rejected": "c"} for letter in "abcdefghi"]
    source = text_source(Dataset.from_list(rows))
    texts = list(sample_texts(source, tokenizer, "mine", 3))
    assert texts == [("a ", "b", "c"), ("e ", "b", "c"), ("i ", "b", "c")]
    rows[4]["chosen"] = None
    source = text_source(Dataset.from_list(rows))
    assert [text[0] for text in sample_texts(source, tokenizer, "mine", 3)] == ["a ", "i "]


def test_text_that_is_there_is_kept(tokenizer):
    table = prepared(Dataset.from_list(ROWS), tokenizer)
    assert table["score"].to_pylist() == [1, 2]
    assert table["prompt"].to_pylist() == ["a ", "d "]
    assert table["chosen_input_ids"].to_pylist() == [[1, A, B, 2], [1, D, E, 2]]
    assert table["rejected_labels"].to_pylist() == [[-100, -100, C, 2], [-100, -100, F, 2]]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_conversations_are_rendered(tokenizer, monkeypatch, at_once):
    monkeypatch.setattr("oddsmith.data.arrow_rows._RENDERED_AT_ONCE", at_once)
    rows = [{**conversation(row), "score": row["score"]} for row in ROWS * 2]
    table = prepared(Dataset.from_list(rows), tokenizer, first=1)
    assert table["score"].to_pylist() == [2, 1, 2]
    assert table["chosen"].type == pa.string()
    assert table["prompt"].to_pylist() == [
        " <user> d  <bot> ",
        " <user> a  <bot> ",
        " <user> d  <bot> ",
    ]
    assert table["chosen"].to_pylist() == ["e", "b", "e"]
    user_id, bot_id = WORDS.index("<user>"), WORDS.index("<bot>")
    assert table["rejected_input_ids"].to_pylist()[0] == [1, user_id, D, bot_id, F, 2]


def test_a_fault_is_named_by_its_place_in_the_dataset(tokenizer):
    rows = [conversation(row) for row in ROWS * 2]
    rows[3]["rejected"] = [user("a"), bot("b")]
    with pytest.raises(ValueError, match="mine row 3: chosen and rejected do not begin with"):
        prepared(Dataset.from_list(rows), tokenizer, first=1)
