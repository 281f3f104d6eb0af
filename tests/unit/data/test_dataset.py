"""prepare_dataset, its checks and chat.row_text."""

import logging

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from oddsmith.data.chat import common_prefix_length, extract_prompt, row_text
from oddsmith.data.dataset import prepare_dataset, validate
from oddsmith.data.rows import RowBuilder
from oddsmith.data.tokenizer import ensure_pad_token
from oddsmith.data.vocabulary import check_vocabulary

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghij", "<user>", "<bot>"]
TEMPLATE = (
    "{% for m in messages %}{{ ' <user> ' if m['role'] == 'user' else ' <bot> ' }}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ ' <bot> ' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def log(caplog):
    """The log, with what has been said once in this process forgotten."""
    transformers_logging.get_logger().warning_once.__func__.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


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


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("a b c", "a b d", "a b"),  # the space goes with the answers
        ("a bc", "a bd", "a b"),
        ("ab", "abcd", "a"),  # one begins the other: the last shared character stays
        ("abc", "abc", "ab"),
        ("yes ", "no", ""),
        ("", "no", ""),
        ([user("x"), bot("y")], [user("x"), bot("z")], [user("x")]),
        ([user("x"), bot("y")], [user("x"), bot("y"), user("z")], [user("x")]),
    ],
)
def test_extract_prompt(chosen, rejected, prompt):
    got = extract_prompt(chosen, rejected)
    assert got[0] == prompt
    assert (got[0] + got[1], got[0] + got[2]) == (chosen, rejected)


@pytest.mark.parametrize(
    "a, b, shared",
    [("", "", 0), ("x", "", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("xb", "ab", 0)],
)
def test_common_prefix_length(a, b, shared):
    assert common_prefix_length(a, b) == common_prefix_length(b, a) == shared
    assert common_prefix_length(list(a), list(b)) == shared


def test_every_form_of_a_row(tokenizer):
    tokenizer.chat_template = TEMPLATE
    expected = (" <user> a <bot> ", "b", "c")
    chosen, rejected = [bot("b")], [bot("c")]
    whole = {"chosen": [user("a"), *chosen], "rejected": [user("a"), *rejected]}
    for row in (
        {"prompt": [user("a")], "chosen": chosen, "rejected": rejected},
        whole,
        {**whole, "prompt": "a"},  # UltraFeedback
        {**whole, "prompt": None, "messages": [user("a")], "label": True},
    ):
        assert row_text(row, tokenizer, "row") == expected
    strings = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    assert row_text(strings, tokenizer, "row") == ("a ", "b", "c")
    assert row_text({"chosen": "a b", "rejected": "a c"}, tokenizer, "row") == ("a", " b", " c")


def test_an_unfinished_answer_is_continued(tokenizer):
    tokenizer.chat_template = TEMPLATE
    row = {"prompt": [user("a"), bot("b")], "chosen": [bot("c")], "rejected": [bot("d")]}
    assert row_text(row, tokenizer, "row") == (" <user> a <bot> b", " <bot> c", " <bot> d")


def test_a_template_that_writes_the_prompt_alone_otherwise(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(
        "%}{{ ' <bot> ' }}{% endif", "%}{{ ' <bot> <think> ' }}{% endif"
    )
    row = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}
    assert row_text(row, tokenizer, "row") == (" <user> a <bot> ", "b", "c")


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools[0]['name'] }} {{ tone }}" + TEMPLATE
    row = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}
    for tools in ([{"name": "d"}], '[{"name": "d"}]'):
        given = {**row, "tools": tools, "chat_template_kwargs": {"tone": "e"}}
        assert row_text(given, tokenizer, "row")[0] == "d e <user> a <bot> "


def test_a_prompt_of_messages_before_strings_is_said(tokenizer, log):
    row = {"prompt": [user("x")], "chosen": "a b", "rejected": "a c"}
    assert row_text(row, tokenizer, "data row 4") == ("a", " b", " c")
    assert "data row 4: prompt is a list of messages" in log.text


GOOD = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, r"data row 1: prompt is 3 \(int\)"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "data row 1: prompt is None"),
        ({"prompt": ["a"], "chosen": "b", "rejected": "c"}, "prompt is .*list of messages"),
        ({**GOOD, "prompt": []}, r"data row 1: prompt is \[\]"),
        ({**GOOD, "prompt": {"role": "user", "content": "a"}}, r"prompt is .* \(dict\)"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "data row 1: chosen is None"),
        ({"prompt": "a", "chosen": "b", "rejected": 1.5}, "data row 1: rejected is 1.5"),
        ({**GOOD, "rejected": "c"}, "both be strings or both be lists"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "do not begin with the same message"),
        ({**GOOD, "prompt": [{"role": "system", "content": "a"}]}, "role 'system'"),
    ],
)
def test_rows_of_the_wrong_kind(tokenizer, row, words):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=words):
        row_text(row, tokenizer, "data row 1")


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


def test_a_tokenize_row_of_ones_own(tokenizer):
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
    assert "1 of 3 rows have no token of a completion left within max_length 5" in log.text
    log.clear()
    prepare(ROWS, tokenizer, max_length=8)
    assert not log.records


@pytest.mark.parametrize("make", [Dataset.from_list, stream_of])
def test_max_length_below_every_completion(tokenizer, make):
    with pytest.raises(ValueError, match="no token of a completion left within max_length 2;"):
        prepare(make(ROWS), tokenizer, max_length=2)


def test_drop_that_leaves_nothing(tokenizer):
    with pytest.raises(ValueError, match="3 of 3 rows .* overlength='drop' leaves none"):
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


def test_pad_token_falls_back_to_eos_and_says_so_once(tokenizer, log):
    assert ensure_pad_token(tokenizer) == 0
    assert not log.records
    for _ in range(2):
        tokenizer.pad_token = None
        assert ensure_pad_token(tokenizer) == 2
    assert tokenizer.pad_token == "</s>"
    assert len(log.records) == 1 and "EOS token '</s>'" in log.text
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.pad_token"):
        ensure_pad_token(tokenizer)


@pytest.mark.parametrize("kind", ["dataset", "selected", "stream", "list"])
def test_vocabulary(tokenizer, kind):
    prepared = prepare(ROWS, tokenizer)
    rows = {
        "dataset": prepared,
        "selected": prepared.select([2, 0]),
        "stream": prepared.to_iterable_dataset(),
        "list": list(prepared),
    }[kind]
    check_vocabulary(rows, 11)
    # "h" is token 10; only row 2 has it, which `selected` puts first.
    row = 0 if kind == "selected" else 2
    words = rf"mine row {row}: rejected_\w+ has token id 10; .*has 10 \(0 to 9\)"
    with pytest.raises(ValueError, match=words):
        check_vocabulary(rows, 10, name="mine")


def test_vocabulary_beyond_the_first_batch_and_below_zero(tokenizer):
    ids = [[3]] * 2500
    ids[2345] = [3, 99]
    with pytest.raises(ValueError, match="row 2345: chosen_labels has token id 99"):
        check_vocabulary(Dataset.from_dict({"chosen_labels": ids}), 50)
    masked = Dataset.from_dict({"chosen_labels": [[-100, 4]], "chosen_input_ids": [[3, 4]]})
    check_vocabulary(masked, 5)
    with pytest.raises(ValueError, match="chosen_input_ids has token id -1"):
        check_vocabulary(Dataset.from_dict({"chosen_input_ids": [[3, -1]]}), 5)
    check_vocabulary(Dataset.from_dict({"text": ["a"]}), 5)
