"""RowBuilder on a vocabulary of words, small enough to compute by hand."""

import pytest
import torch

from oddsmith.data import rows as rows_module
from oddsmith.data.rows import RowBuilder
from support.word_tokenizer import WORDS

A, B, C, D, E, F = range(3, 9)
ROW = {"prompt": "a b c ", "chosen": "d e f", "rejected": "d"}


def test_a_row_by_hand(tokenizer):
    assert RowBuilder(tokenizer).tokenize_row(ROW) == {
        "chosen_input_ids": [1, A, B, C, D, E, F, 2],
        "chosen_attention_mask": [1] * 8,
        "chosen_labels": [-100] * 4 + [D, E, F, 2],
        "rejected_input_ids": [1, A, B, C, D, 2],
        "rejected_attention_mask": [1] * 6,
        "rejected_labels": [-100] * 4 + [D, 2],
        "prompt_input_ids": [1, A, B, C],
        "prompt_attention_mask": [1] * 4,
    }


@pytest.mark.parametrize(
    "max_length, chosen, rejected, overlength",
    [
        (8, [1, A, B, C, D, E, F, 2], [1, A, B, C, D, 2], False),
        (7, [1, A, B, C, D, E, F], [1, A, B, C, D, 2], True),
        (5, [1, A, B, C, D], [1, A, B, C, D], True),
        # The prompt alone fills it: TRL does not cut it.
        (4, [1, A, B, C], [1, A, B, C], True),
        (3, [1, A, B, C], [1, A, B, C], True),
    ],
)
def test_answers_are_cut_to_what_the_prompt_leaves(
    tokenizer, max_length, chosen, rejected, overlength
):
    builder = RowBuilder(tokenizer, max_length)
    row = builder.tokenize_row(ROW)
    assert row["chosen_input_ids"] == chosen
    assert row["rejected_input_ids"] == rejected
    assert builder.is_overlength(ROW) is overlength


@pytest.mark.parametrize(
    "max_length, mode, prompt, chosen, rejected",
    [
        # 4 + 4 > 7: the prompt is cut to 2, then 2 + 4 fits.
        (7, "keep_end", [B, C], [D, E, F, 2], [D, 2]),
        (7, "keep_start", [1, A], [D, E, F, 2], [D, 2]),
        # 2 + 4 > 5: both answers are cut to 5 - 2.
        (5, "keep_end", [B, C], [D, E, F], [D, 2]),
        (8, "keep_end", [1, A, B, C], [D, E, F, 2], [D, 2]),
    ],
)
def test_max_prompt_length(tokenizer, max_length, mode, prompt, chosen, rejected):
    builder = RowBuilder(tokenizer, max_length, 2, mode, label_pad_token_id=-7)
    row = builder.tokenize_row(ROW)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        assert row[f"{side}_input_ids"] == prompt + answer
        assert row[f"{side}_labels"] == [-7] * len(prompt) + answer
    assert row["prompt_input_ids"] == prompt
    assert builder.is_overlength(ROW) is (max_length < 8)


def test_many_rows_are_the_rows_one_by_one(tokenizer):
    features = [ROW, {"prompt": "", "chosen": "", "rejected": "a b"}, {**ROW, "chosen": "f </s>"}]
    builder = RowBuilder(tokenizer, 7)
    columns = ([feature[name] for feature in features] for name in ("prompt", "chosen", "rejected"))
    rows, overlength = builder.tokenize_batch(*columns)
    assert rows == [builder.tokenize_row(feature) for feature in features]
    assert overlength == [True, False, False]
    assert builder.tokenize_batch([], [], []) == ([], [])


def test_an_overridden_build_tokenized_answer(tokenizer):
    builder = RowBuilder(tokenizer, 6)

    def shouting(prompt, answer):
        tokens = builder.build_tokenized_answer(prompt, answer)
        ids = tokens["input_ids"] + [B]
        return {**tokens, "input_ids": ids, "attention_mask": [1] * len(ids)}

    row = builder.tokenize_row(ROW, build_tokenized_answer=shouting)
    assert row["chosen_input_ids"] == [1, A, B, C, D, E]
    assert row["rejected_input_ids"] == [1, A, B, C, D, B]
    assert row["prompt_input_ids"] == [1, A, B, C]


def test_the_boundary_moves_back_over_a_merged_token(tokenizer):
    # "a b" + "c" is "a", "bc": the last token of the prompt (b, 4) differs in the complete text
    # (<pad>).
    tokens = RowBuilder(tokenizer).build_tokenized_answer("a b", "c d")
    assert tokens["prompt_input_ids"] == [A]
    assert tokens["input_ids"] == [0, D]


def test_rows_that_cannot_be_split(tokenizer):
    class Merging:
        """Encodes any text with an x as one token."""

        bos_token_id = eos_token_id = None

        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [[9] if "x" in text else [3] * len(text) for text in texts]}

    builder = RowBuilder(Merging())
    with pytest.raises(ValueError, match="fewer than the prompt alone"):
        builder.tokenize_row({"prompt": "aaa", "chosen": "x", "rejected": "b"})
    with pytest.raises(ValueError, match="data row 7: .*fewer than the prompt alone"):
        builder.tokenize_batch(["aaa"], ["x"], ["b"], ["data row 7"])

    def disagreeing(prompt, answer):
        ids = [3, 4, 5] if answer == "d" else [6, 7, 8]
        return {"prompt_input_ids": ids, "prompt_attention_mask": [1] * 3} | {
            "input_ids": [9],
            "attention_mask": [1],
        }

    with pytest.raises(ValueError, match="differ between chosen and rejected"):
        RowBuilder(tokenizer).tokenize_row(ROW, build_tokenized_answer=disagreeing)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_fields_must_be_strings(tokenizer, field):
    with pytest.raises(ValueError, match=f"{field} is a list; must be a string"):
        RowBuilder(tokenizer).tokenize_row({**ROW, field: ["a"]})


def test_encoder_decoder_rows_and_decoder_inputs(tokenizer):
    class Model:
        def prepare_decoder_input_ids_from_labels(self, labels):
            return torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], dim=1)

    builder = RowBuilder(tokenizer, is_encoder_decoder=True, max_completion_length=2)
    row = builder.tokenize_row(ROW, model=Model())
    assert row == {
        "chosen_labels": [D, E],
        "rejected_labels": [D],
        "prompt_input_ids": [A, B, C],
        "prompt_attention_mask": [1, 1, 1],
        "chosen_decoder_input_ids": [0, D],
        "rejected_decoder_input_ids": [0],
    }
    assert builder.is_overlength(ROW)
    assert RowBuilder(tokenizer, is_encoder_decoder=True).max_completion_length == 128


def test_rows_have_one_length_on_xla(tokenizer, monkeypatch):
    monkeypatch.setattr(rows_module, "is_torch_xla_available", lambda: True)
    row = RowBuilder(tokenizer, 9, padding_value=3).tokenize_row(ROW)
    assert {len(values) for values in row.values()} == {9}
    assert row["chosen_input_ids"] == [1, A, B, C, D, E, F, 2, 3]
    assert row["chosen_attention_mask"] == [1] * 8 + [0]
    assert row["chosen_labels"] == [-100] * 4 + [D, E, F, 2, -100]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 8, "max_prompt_length": 9}, "at most max_length 8"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'"),
    ],
)
def test_bad_arguments(tokenizer, given, words):
    with pytest.raises(ValueError, match=words):
        RowBuilder(tokenizer, **given)


def test_a_prompt_limit_of_max_length(tokenizer):
    """TRL's rule leaves the answers nothing then; they get what their prompt leaves."""
    builder = RowBuilder(tokenizer, 6, 6)
    row = builder.tokenize_row(ROW)
    assert row["chosen_input_ids"] == [1, A, B, C, D, E]
    assert row["rejected_input_ids"] == [1, A, B, C, D, 2]
    # 7 + 2 > 6: the prompt is cut to 6, and nothing is left.
    row = builder.tokenize_row({"prompt": "a b c d e f ", "chosen": "a", "rejected": "b"})
    assert row["chosen_input_ids"] == [A, B, C, D, E, F]


def test_a_row_without_a_token_is_an_error(tokenizer):
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 1: prompt and rejected are both empty"):
        RowBuilder(tokenizer).tokenize_batch(["a", ""], ["b", "c"], ["d", ""], ["row 0", "row 1"])


def test_a_tokenizer_that_takes_one_text_at_a_time(tokenizer):
    class Alone:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text, add_special_tokens=True):
            ids = [WORDS.index(word) for word in text.split()]  # a list has no split
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    assert RowBuilder(Alone()).tokenize_row(ROW) == RowBuilder(tokenizer).tokenize_row(ROW)
