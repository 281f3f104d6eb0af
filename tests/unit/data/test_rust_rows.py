"""FastRows and the tables made with it: columns, cache, faults, and when Python is used instead."""

import pickle
import re

import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_from_disk
from tokenizers import NormalizedString, PreTokenizedString, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oddsmith.data import dataset as data_module
from oddsmith.data import rust_rows as fast_module
from oddsmith.data.dataset import prepare_dataset
from oddsmith.data.rows import RowBuilder
from oddsmith.data.rust_rows import FastRows, Unsuited, fast_rows_for
from support.word_tokenizer import TEMPLATE, WORDS, bot, user, word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def only_plain(monkeypatch):
    """Turns the fast rows off."""

    def turn_off():
        monkeypatch.setattr(data_module, "fast_rows_for", lambda *_: None)

    return turn_off


ROWS = [
    {"prompt": "a ", "chosen": "b", "rejected": "c"},
    {"prompt": "a b c d ", "chosen": "e f", "rejected": "g"},
    {"prompt": "a b ", "chosen": "c d e", "rejected": "f g h"},
]


def conversation(row):
    messages = {side: [user(row["prompt"]), bot(row[side])] for side in ("chosen", "rejected")}
    return {"prompt": row["prompt"], **messages}


def prepare(dataset, tokenizer, max_length=20, **kwargs):
    dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    builder = RowBuilder(tokenizer, max_length)
    return prepare_dataset(dataset, tokenizer, builder.tokenize_row, **kwargs)


def test_columns_are_small_integers_in_the_order_of_a_row(tokenizer):
    prepared = prepare(ROWS, tokenizer)
    types = {
        name: feature.feature.dtype
        for name, feature in prepared.features.items()
        if name not in ROWS[0]
    }
    assert list(types) == list(RowBuilder(tokenizer).tokenize_row(ROWS[0]))
    for name, dtype in types.items():
        assert dtype == ("int8" if name.endswith("mask") else "int32")
    assert prepared.format["type"] is None


@pytest.mark.parametrize("form", ["strings", "conversations", "implicit", "selected"])
def test_a_dataset_is_the_plain_path_s(tokenizer, only_plain, form):
    rows = [{**row, "score": index / 2, "kind": index % 2} for index, row in enumerate(ROWS * 150)]
    if form == "conversations":
        rows = [{**row, **conversation(row)} for row in rows]
    if form == "implicit":
        rows = [{**row, "chosen": "a b" + row["chosen"], "rejected": "a c"} for row in rows]
        rows = [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    dataset = Dataset.from_list(rows).cast_column("kind", ClassLabel(names=["easy", "hard"]))
    if form == "selected":
        dataset = dataset.select(range(len(dataset) - 1, 0, -3))
    made = prepare(dataset, tokenizer, max_length=7)
    only_plain()
    plain = prepare(dataset, tokenizer, max_length=7)
    assert made.column_names == plain.column_names
    assert list(made) == list(plain)
    for name in ("prompt", "chosen", "score", "kind"):
        assert made.features[name] == plain.features[name]


def test_columns_of_large_strings_and_nulls_beside(tokenizer):
    features = Features(
        {name: Value("large_string") for name in ROWS[0]} | {"note": Value("string")}
    )
    dataset = Dataset.from_list([{**row, "note": None} for row in ROWS], features=features)
    prepared = prepare(dataset, tokenizer)
    assert prepared[2]["rejected_labels"] == [-100] * 3 + [8, 9, 10, 2]
    assert prepared["note"][:] == [None] * 3


def test_no_rows_have_empty_columns(tokenizer):
    nothing = pa.array([], pa.string())
    columns = FastRows(RowBuilder(tokenizer)).columns(nothing, nothing, nothing)
    assert {len(column) for column in columns.values()} == {0}


def test_num_proc_changes_nothing(tokenizer):
    conversations = [conversation(row) for row in ROWS]
    for rows in (ROWS, conversations):
        assert list(prepare(rows, tokenizer, num_proc=2)) == list(prepare(rows, tokenizer))


def test_streams(tokenizer):
    def rows():
        yield from (ROWS * 40)

    stream = prepare(IterableDataset.from_generator(rows), tokenizer, max_length=7)
    assert list(stream) == list(prepare(ROWS * 40, tokenizer, max_length=7))


def test_workers_of_a_data_loader_start_threads(tokenizer):
    """A forked process has the memory of a thread pool without its threads."""
    dataset = Dataset.from_list(ROWS * 40)
    expected = prepare(dataset, tokenizer)  # the pool runs
    stream = prepare(dataset.to_iterable_dataset(num_shards=2), tokenizer)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2, timeout=60)
    loaded = sorted(str(row) for row in loader)
    assert loaded == sorted(str(row) for row in expected)


def test_pickled_it_makes_the_same_rows(tokenizer):
    fast = FastRows(RowBuilder(tokenizer, 6))
    texts = [pa.array([row[name] for row in ROWS]) for name in ROWS[0]]
    again = pickle.loads(pickle.dumps(fast))
    assert again.columns(*texts) == fast.columns(*texts)


# Faults


def test_the_first_row_with_a_fault_is_named(tokenizer):
    rows = [conversation(row) for row in ROWS * 100]
    for index in (250, 120, 290):
        rows[index]["chosen"][1]["content"] = None
    with pytest.raises(
        ValueError, match=r"train_dataset row 120: chosen\[1\] is .* content is None"
    ):
        prepare(rows, with_strict_template(tokenizer))


def with_strict_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture
def merging():
    """Letters of which "abc" is one token, but only as "a" and "bc"."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "bc": 5, "abc": 6, " ": 7}
    made = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "bc")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def test_a_row_that_cannot_be_split_names_its_side(merging, log):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"} for _ in range(60)]
    rows[33] = {"prompt": "ab", "chosen": "a", "rejected": "c"}
    words = (
        "train_dataset row 33: prompt and rejected together have 1 tokens, fewer than the prompt"
    )
    with pytest.raises(ValueError, match=words):
        prepare(rows, merging)
    with pytest.raises(ValueError, match="^" + words):
        RowBuilder(merging).tokenize_batch(
            *([row[name] for row in rows] for name in rows[0]),
            [f"train_dataset row {index}" for index in range(60)],
        )
    assert not log.records  # the fault is the row's, not the tokenizer's


def test_a_fault_in_rust_comes_before_a_later_one_of_the_template(merging):
    rows = [
        {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]} for _ in range(300)
    ]
    rows[20] = {"chosen": [user("ab"), bot("a")], "rejected": [user("ab"), bot("c")]}
    rows[280] = {"chosen": [user("a"), bot("b")], "rejected": [user("b"), bot("b")]}
    with pytest.raises(ValueError, match="train_dataset row 20: prompt and rejected"):
        prepare(rows, merging)


# The cache


def on_disk(rows, folder):
    Dataset.from_list(rows).save_to_disk(folder)
    return load_from_disk(folder)


@pytest.fixture
def counted(monkeypatch):
    """Numbers of rows that Rust was given, sample included."""
    given, columns = [], FastRows.columns

    def counting(self, prompts, *others, **kwargs):
        given.append(len(prompts))
        return columns(self, prompts, *others, **kwargs)

    monkeypatch.setattr(FastRows, "columns", counting)
    return given


@pytest.mark.parametrize("form", ["strings", "conversations"])
def test_a_second_run_reads_the_cache(tokenizer, tmp_path, counted, form):
    rows = ROWS * 20 if form == "strings" else [conversation(row) for row in ROWS * 20]
    first = prepare(on_disk(rows, tmp_path / "rows"), tokenizer)
    assert max(counted) == 60
    counted.clear()
    # Another process has another tokenizer object, which has been used or not.
    other = word_tokenizer(chat_template=TEMPLATE)
    other(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert list(prepare(load_from_disk(tmp_path / "rows"), other)) == list(first)
    assert set(counted) == {1}  # only the sample


def test_what_changes_the_rows_changes_the_fingerprint(tokenizer):
    dataset, other = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:2])
    seen = {FastRows(RowBuilder(tokenizer)).fingerprint(dataset)}

    def check(builder, rows=dataset):
        made = FastRows(builder).fingerprint(rows)
        assert made not in seen
        seen.add(made)

    check(RowBuilder(tokenizer), other)
    check(RowBuilder(tokenizer, 30))
    check(RowBuilder(tokenizer, 1024, 9))
    check(RowBuilder(tokenizer, 1024, 9, "keep_start"))
    check(RowBuilder(tokenizer, label_pad_token_id=-1))
    tokenizer.chat_template += " "
    check(RowBuilder(tokenizer))
    tokenizer.split_special_tokens = True
    check(RowBuilder(tokenizer))
    tokenizer.add_tokens(["<tool>"])
    check(RowBuilder(tokenizer))
    tokenizer.eos_token = "<bot>"
    check(RowBuilder(tokenizer))
    made = FastRows(RowBuilder(tokenizer)).fingerprint(dataset)
    assert made == FastRows(RowBuilder(tokenizer)).fingerprint(dataset)


# Where Python is used


class Shouting(PreTrainedTokenizerFast):
    """A class with a step besides its backend."""

    def __call__(self, text, *args, **kwargs):
        text = [part.replace("a", "b") for part in text]
        return super().__call__(text, *args, **kwargs)


class Splitting:
    def split(self, _, text: NormalizedString):
        return text.split(" ", "removed")

    def pre_tokenize(self, text: PreTokenizedString):
        text.split(self.split)


class OwnRules(RowBuilder):
    pass


def with_python_component():
    tokenizer = word_tokenizer(chat_template=TEMPLATE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Splitting())
    return tokenizer


class Slow:
    """A Python-only tokenizer with the methods that rows need."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [[WORDS.index(word) for word in text.split()] for text in texts]}


@pytest.mark.parametrize(
    "make, reason",
    [
        (Slow, "Slow is not a fast tokenizer"),
        (
            lambda: word_tokenizer(kind=Shouting, chat_template=TEMPLATE),
            "Shouting overrides __call__",
        ),
        (with_python_component, "the backend of .* cannot be written as JSON: .*serialized"),
    ],
)
def test_tokenizers_that_need_python(make, reason, log):
    tokenizer = make()
    prepared = prepare(ROWS, tokenizer)
    builder = RowBuilder(tokenizer, 20)
    assert [row["chosen_input_ids"] for row in prepared] == [
        builder.tokenize_row(row)["chosen_input_ids"] for row in ROWS
    ]
    (line,) = (record.getMessage() for record in log.records if "oddsmith" in record.name)
    assert re.match(f"train_dataset is tokenised in Python, more slowly: {reason}", line)


@pytest.mark.parametrize("make", [Dataset.from_list, lambda rows: stream_of(rows)])
def test_rows_that_differ_need_python(monkeypatch, make, log):
    monkeypatch.setattr(fast_module, "_ENCODING_METHODS", ())
    prepared = prepare(make(ROWS), word_tokenizer(kind=Shouting, chat_template=TEMPLATE))
    assert next(iter(prepared))["prompt_input_ids"] == [1, 4]  # "b" for "a"
    assert "the backend alone encodes the prompt 'a ' differently" in log.text
    assert len(log.records) == 1


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda made: OwnRules(made), "OwnRules overrides its rules"),
        (lambda made: RowBuilder(made, label_pad_token_id=2**40), "int"),
        (
            lambda made: RowBuilder(made, is_encoder_decoder=True, max_completion_length=9),
            "encoder",
        ),
    ],
)
def test_builders_that_need_python(tokenizer, make, reason):
    with pytest.raises(Unsuited, match=reason):
        FastRows(make(tokenizer))


def test_rows_padded_for_xla_need_python(tokenizer, monkeypatch):
    monkeypatch.setattr(fast_module, "is_torch_xla_available", lambda: True)
    with pytest.raises(Unsuited, match="XLA"):
        FastRows(RowBuilder(tokenizer))


def test_encoder_decoders_are_not_remarked_on(tokenizer, log):
    builder = RowBuilder(tokenizer, is_encoder_decoder=True, max_completion_length=9)
    assert fast_rows_for(builder, [("a", "b", "c")], "mine") is None
    assert fast_rows_for(None, [("a", "b", "c")], "mine") is None
    assert not log.records


def test_a_row_without_a_token_is_named(tokenizer):
    tokenizer.bos_token = tokenizer.eos_token = None
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"} for _ in range(5)]
    rows[3] = {"prompt": "", "chosen": "", "rejected": "c"}
    with pytest.raises(ValueError, match="train_dataset row 3: prompt and chosen are both empty"):
        prepare(rows, tokenizer)
