"""prepare_dataset and validate."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from oddsmith.data.dataset import prepare_dataset, validate
from oddsmith.data.rows import RowBuilder
from support.word_tokenizer import bot, user

# Lengths with BOS and EOS, prompt + longer answer: 2+2, 5+3, 3+4.
ROWS = [
    {"prompt": "a ", "chosen": "b", "rejected": "c", "score": 1},
    {"prompt": "a b c d ", "chosen": "e f", "rejected": "g", "score": 2},
    {"prompt": "a b ", "chosen": "c d e", "rejected": "f g h", "score": 3},
]
TOKENS = {
    f"{side}_{kind}"
    for side in ("chosen", "rejected", "prompt")
    for kind in ("input_ids", "attention_mask", "labels")
} - {"prompt_labels"}


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def prepare(rows, tokenizer, max_length=20, **kwargs):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    builder = RowBuilder(tokenizer, max_length)
    return prepare_dataset(dataset, tokenizer, builder.tokenize_row, **kwargs)


# Text


GOOD = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}


def test_no_chat_template(tokenizer):
    with pytest.raises(ValueError, match=r"train_dataset row 0: .*set tokenizer.chat_template ="):
        prepare([GOOD], tokenizer)


def test_a_template_that_fails(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(ValueError, match="row 0: the chat template cannot render.*only two turns"):
        prepare([GOOD], tokenizer)


# Datasets


@pytest.mark.parametrize("num_proc", [None, 2])
def test_columns_and_values(tokenizer, num_proc):
    prepared = prepare(ROWS, tokenizer, num_proc=num_proc)
    assert set(prepared.column_names) == TOKENS | set(ROWS[0])
    assert prepared[1]["chosen_input_ids"] == [1, 3, 4, 5, 6, 7, 8, 2]
    assert prepared["score"][:] == [1, 2, 3]


def test_a_formatted_dataset(tokenizer):
    dataset = Dataset.from_list(ROWS).with_format("torch")
    assert prepare(dataset, tokenizer)[2]["rejected_labels"] == [-100] * 3 + [8, 9, 10, 2]


def test_streams_give_the_same_rows(tokenizer):
    prepared = prepare(ROWS, tokenizer, max_length=6)
    stream = prepare(stream_of(ROWS), tokenizer, max_length=6)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(prepared)
    assert list(stream) == list(prepared)  # and again


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_dicts_of_datasets(tokenizer, kind):
    parts = kind(easy=Dataset.from_list(ROWS[:1]), hard=Dataset.from_list(ROWS[1:]))
    builder = RowBuilder(tokenizer)
    prepared = prepare_dataset(parts, tokenizer, builder.tokenize_row, name="eval_dataset")
    assert type(prepared) is kind
    assert {key: len(part) for key, part in prepared.items()} == {"easy": 1, "hard": 2}
    assert TOKENS <= set(prepared["hard"].column_names)
    parts["hard"] = Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match=r"eval_dataset\['hard'\] has no column chosen"):
        prepare_dataset(parts, tokenizer, builder.tokenize_row, name="eval_dataset")


def test_an_overridden_tokenize_row(tokenizer):
    builder = RowBuilder(tokenizer, 6)

    def scored(feature):
        return {**builder.tokenize_row(feature), "weight": feature["score"] * 10}

    dataset = Dataset.from_list(ROWS)
    prepared = prepare_dataset(dataset, tokenizer, scored)
    assert prepared["weight"][:] == [10, 20, 30]
    assert prepared[0]["chosen_input_ids"] == [1, 3, 4, 2]
    kept = prepare_dataset(dataset, tokenizer, scored, overlength="drop", builder=builder)
    assert kept["weight"][:] == [10]
    with pytest.raises(ValueError, match="needs `builder`"):
        prepare_dataset(dataset, tokenizer, scored, overlength="drop")


def test_a_row_that_fails_is_named(tokenizer):
    rows = [*ROWS, {**ROWS[0], "chosen": None}]
    with pytest.raises(ValueError, match="train_dataset row 3: chosen is None"):
        prepare(rows, tokenizer)
    with pytest.raises(ValueError, match="train_dataset row 3: chosen is None"):
        prepare(stream_of(rows), tokenizer)

    def failing(feature):
        raise ValueError("no")

    with pytest.raises(ValueError, match="train_dataset row 0: no"):
        prepare_dataset(Dataset.from_list(ROWS), tokenizer, failing)


@pytest.mark.parametrize("make", [Dataset.from_list, stream_of])
def test_drop(tokenizer, log, make):
    kept = prepare(make(ROWS), tokenizer, max_length=7, overlength="drop")
    assert [row["score"] for row in kept] == [1, 3]
    if make is not stream_of:
        assert (
            "train_dataset: 1 of 3 rows (33.3%) are longer than max_length 7: dropped" in log.text
        )


def test_truncate_is_counted(tokenizer, log):
    assert len(prepare(ROWS, tokenizer, max_length=5)) == 3
    assert "2 of 3 rows (66.7%) are longer than max_length 5: truncated" in log.text
    assert "1 of 3 rows have no completion tokens within max_length 5" in log.text
    log.clear()
    prepare(ROWS, tokenizer, max_length=8)
    assert not log.records


@pytest.mark.parametrize("make", [Dataset.from_list, stream_of])
def test_max_length_below_every_completion(tokenizer, make):
    with pytest.raises(ValueError, match="no completion tokens within max_length 2;"):
        prepare(make(ROWS), tokenizer, max_length=2)


def test_drop_that_leaves_nothing(tokenizer):
    with pytest.raises(ValueError, match="3 of 3 rows .* overlength='drop' removes all"):
        prepare(ROWS, tokenizer, max_length=3, overlength="drop")


def test_unknown_policy(tokenizer):
    with pytest.raises(ValueError, match="overlength is 'keep'"):
        prepare(ROWS, tokenizer, overlength="keep")


# Checks


@pytest.mark.parametrize("make", [Dataset.from_list, stream_of])
def test_missing_columns_are_named_with_those_there_are(tokenizer, make):
    with pytest.raises(ValueError, match="has no column rejected; it has chosen, prompt, worse"):
        validate(make([{"prompt": "a", "chosen": "b", "worse": "c"}]), tokenizer)
    with pytest.raises(ValueError, match="no column chosen and no column rejected; it has text"):
        validate(make([{"text": "a"}]), tokenizer)


def test_empty_datasets(tokenizer):
    empty = Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
    with pytest.raises(ValueError, match="train_dataset is empty"):
        validate(empty, tokenizer)
    with pytest.raises(ValueError, match="mine is empty"):
        validate(stream_of([]), tokenizer, name="mine")


def test_datasets_of_the_wrong_type(tokenizer):
    with pytest.raises(TypeError, match="train_dataset is a list; must be a datasets.Dataset"):
        validate(ROWS, tokenizer)


# What a dataset shows, columns of other names, rows of different keys


def test_a_transform_is_trained_on(tokenizer):
    def swapped(batch):
        return {**batch, "chosen": batch["rejected"], "rejected": batch["chosen"]}

    shown = prepare(Dataset.from_list(ROWS).with_transform(swapped), tokenizer)
    expected = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    assert shown.to_list() == prepare(expected, tokenizer).to_list()


def test_other_names_of_columns(tokenizer, log):
    rows = [{"question" if key == "prompt" else key: row[key] for key in row} for row in ROWS]
    prepared = prepare(rows, tokenizer)
    assert prepared.to_list() == prepare(ROWS, tokenizer).to_list()
    assert log.text.count("train_dataset: question is the prompt;") == 1
    named = [{"frage" if key == "prompt" else key: row[key] for key in row} for row in ROWS]
    prepared = prepare(named, tokenizer, column_mapping={"frage": "prompt"})
    assert prepared.to_list() == prepare(ROWS, tokenizer).to_list()


def test_streams_of_rows_with_different_keys(tokenizer):
    rows = [dict(row) for row in ROWS]
    rows[0]["extra"] = "x"
    del rows[1]["score"]
    made = list(prepare(stream_of(rows), tokenizer))
    assert [row["chosen_input_ids"] for row in made] == prepare(ROWS, tokenizer)[
        "chosen_input_ids"
    ][:]
    del rows[2]["rejected"]
    with pytest.raises(ValueError, match="train_dataset row 2: rejected is None"):
        prepare(stream_of(rows), tokenizer)


def test_columns_of_the_user_with_the_names_of_tokens(tokenizer, log):
    rows = [{**row, "chosen_labels": "good", "prompt_input_ids": 3} for row in ROWS]
    assert prepare(rows, tokenizer).to_list() == prepare(ROWS, tokenizer).to_list()
    assert "columns chosen_labels, prompt_input_ids are made from the text" in log.text


def test_notes_for_the_report(tokenizer):
    builder = RowBuilder(tokenizer, 7)
    rows = [{**row, "system": "be very brief"} for row in ROWS]
    prepare_dataset(Dataset.from_list(rows), tokenizer, builder.tokenize_row, name="mine")
    notes = builder.notes["mine"]
    assert (notes.overlength, notes.cut.tolist()) == (1, [False, True, False])
    assert notes.unused == ("system",)
