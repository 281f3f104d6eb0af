"""Rows made in Rust are those of the tokenizer's Python class, value for value."""

import pyarrow as pa
import pytest
from tokenizers import AddedToken

from oddsmith.data.chat import row_text
from oddsmith.data.rows import RowBuilder
from oddsmith.data.rust_rows import EMPTY, OVERLENGTH, FastRows
from support.generated_pairs import conversation_rows, string_rows
from support.tokenizer_zoo import FAMILIES, mistral

TOKENIZERS = [*FAMILIES, "mistral"]
LIMITS = [(1024, None), (23, None), (40, 11), (40, 39), (40, 40)]


def tokenizer_named(name, folder):
    if name == "mistral":
        pytest.importorskip("mistral_common", reason="brings the tokenizer of Mistral-7B")
        return mistral(folder)
    return FAMILIES[name]()


def texts_of(tokenizer):
    rows = [
        *string_rows(150, seed=21, implicit=False),
        *string_rows(150, seed=22, implicit=True),
        *conversation_rows(60, seed=23, implicit=False),
    ]
    return [row_text(row, tokenizer, "row") for row in rows]


def check_same(builder, texts):
    """Rows, flags and errors; returns how many rows were errors and how many too long."""
    fast, kept, faults = FastRows(builder), [], 0
    for index, text in enumerate(texts):
        batch = [[part] for part in text]
        try:
            builder.tokenize_batch(*batch, [f"mine row {index}"])
        except ValueError as error:
            with pytest.raises(ValueError) as raised:
                fast.columns(*map(pa.array, batch), name="mine", first_row=index)
            assert str(raised.value) == str(error)
            faults += 1
        else:
            kept.append(text)
    rows, overlength = builder.tokenize_batch(*zip(*kept, strict=True))
    columns = fast.columns(*(pa.array(part, pa.string()) for part in zip(*kept, strict=True)))
    assert list(columns) == [*rows[0], OVERLENGTH, EMPTY]
    assert columns[OVERLENGTH].to_pylist() == overlength
    made = pa.table({key: columns[key] for key in rows[0]}).to_pylist()
    for index, (a, b) in enumerate(zip(made, rows, strict=True)):
        assert a == b, f"row {index}"
    empty = [max(row["chosen_labels"] + row["rejected_labels"]) < 0 for row in rows]
    assert columns[EMPTY].to_pylist() == empty
    return faults, sum(overlength)


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("max_length, max_prompt_length", LIMITS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_family_and_limit(name, max_length, max_prompt_length, mode, tmp_path):
    tokenizer = tokenizer_named(name, tmp_path)
    builder = RowBuilder(tokenizer, max_length, max_prompt_length, mode)
    faults, overlength = check_same(builder, texts_of(tokenizer))
    assert (overlength > 0) == (max_length < 1024)
    if name == "byte_level_bpe":
        assert faults > 0


SPICED = [
    ("<s>ka lo</s>", "</s> mi", "<s>"),
    ("</s>", "", "</s>"),
    ("", "ka", "lo"),
    (" ka\u00a0lo \u200b", "e\u0301", "é"),
    ("ka <tool> lo", " <tool>", "<tool>ka"),
    ("ka\tlo\r\n", "\ufeffmi", "🙂" * 40),
]


@pytest.mark.parametrize("split_special_tokens", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_and_added_tokens(name, split_special_tokens, tmp_path):
    tokenizer = tokenizer_named(name, tmp_path)
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[X]"]})
    tokenizer.split_special_tokens = split_special_tokens
    texts = [*SPICED, ("ka[X]lo", "[X]", "mi[X] "), *texts_of(tokenizer)[:40]]
    check_same(RowBuilder(tokenizer, 30), texts)
    with_mark = tokenizer("[X]", add_special_tokens=False)["input_ids"]
    assert (len(with_mark) == 1) != split_special_tokens


@pytest.mark.parametrize("bos, eos", [(None, "</s>"), ("<s>", None), ("</s>", "</s>")])
def test_other_marks(bos, eos):
    tokenizer = FAMILIES["sentencepiece_bpe"]()
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    for label_pad in (-100, 0, -5):
        builder = RowBuilder(tokenizer, 9, label_pad_token_id=label_pad)
        check = [*SPICED, *texts_of(tokenizer)[:40]] if label_pad < 0 else SPICED[:4]
        if label_pad < 0:
            check_same(builder, check)
        else:
            rows, _ = builder.tokenize_batch(*zip(*check, strict=True))
            fast = FastRows(builder).columns(*map(pa.array, zip(*check, strict=True)))
            assert fast["chosen_labels"].to_pylist() == [row["chosen_labels"] for row in rows]


def test_what_the_last_call_left_in_the_backend_is_not_used():
    tokenizer = FAMILIES["unigram"]()
    texts = texts_of(tokenizer)[:30]
    tokenizer(["ka", "ka lo mi"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation and tokenizer.backend_tokenizer.padding
    fast = FastRows(RowBuilder(tokenizer, 60))
    columns = fast.columns(*map(pa.array, zip(*texts, strict=True)))
    rows, _ = RowBuilder(tokenizer, 60).tokenize_batch(*zip(*texts, strict=True))
    assert columns["chosen_input_ids"].to_pylist() == [row["chosen_input_ids"] for row in rows]
    assert max(map(len, columns["chosen_input_ids"].to_pylist())) > 3
