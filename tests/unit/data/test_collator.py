"""PreferenceCollator: padding by hand, and the packed batch."""

import pytest
import torch

from oddsmith.data.collator import PreferenceCollator
from oddsmith.data.rows import RowBuilder
from oddsmith.head.logits import concatenate

A, B, C, D, E, F = range(3, 9)
COLUMNS = ("input_ids", "attention_mask", "labels")
ROW = {"prompt": "a b c ", "chosen": "d e f", "rejected": "d"}


def test_collator_pads_prompts_left_and_the_rest_right(tokenizer):
    builder = RowBuilder(tokenizer)
    short = {"prompt": "a ", "chosen": "b", "rejected": "c d e f"}
    features = [{**row, **builder.tokenize_row(row), "score": 0.5} for row in (ROW, short)]
    batch = PreferenceCollator(0, label_pad_token_id=-9)(features)
    assert batch["prompt_input_ids"].tolist() == [[1, A, B, C], [0, 0, 1, A]]
    assert batch["prompt_attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["chosen_input_ids"].tolist() == [[1, A, B, C, D, E, F, 2], [1, A, B, 2] + [0] * 4]
    assert batch["chosen_attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    assert batch["rejected_labels"].tolist() == [
        [-100] * 4 + [D, 2, -9],
        [-100] * 2 + [C, D, E, F, 2],
    ]
    assert batch["rejected_labels"].dtype == torch.int64
    assert batch["chosen"] == ["d e f", "b"]
    assert batch["score"] == [0.5, 0.5]


def test_collator_needs_a_pad_token():
    with pytest.raises(ValueError, match="set tokenizer.pad_token"):
        PreferenceCollator(None)


def test_prompts_of_encoder_decoders_are_padded_on_the_right():
    rows = [{"prompt_input_ids": [A, B, C]}, {"prompt_input_ids": [A]}]
    assert PreferenceCollator(9)(rows)["prompt_input_ids"].tolist() == [[A, B, C], [9, 9, A]]
    batch = PreferenceCollator(9, is_encoder_decoder=True)(rows)
    assert batch["prompt_input_ids"].tolist() == [[A, B, C], [A, 9, 9]]


def test_a_packed_batch_is_there_until_a_column_changes(tokenizer):
    rows = [RowBuilder(tokenizer).tokenize_row(ROW)]
    assert PreferenceCollator(0)(rows).packed() is None
    batch = PreferenceCollator(0, packing=True, share_prompt=True)(rows)
    # The prompt once; the rejected part repeats its last token.
    assert batch.packed().input_ids.tolist() == [[1, A, B, C, D, E, F, 2, C, D, 2]]
    moved = batch.to("cpu")
    assert moved.packed() is not None and moved["chosen_labels"] is batch["chosen_labels"]
    batch["chosen_labels"] = batch["chosen_labels"].clone()
    assert batch.packed() is not None  # the same values
    batch["chosen_labels"] = batch["chosen_labels"] + 1
    assert batch.packed() is None and moved.packed() is not None
    moved["chosen_labels"][0, -1] = -100
    assert moved.packed() is None


def test_columns_of_the_user_with_such_names_stay_lists():
    names = {
        "annotator_labels": ["good", "bad"],
        "chosen_labels_of": ["x"],
        "human_labels": "text",
        "packed": 7,
        "chosen_votes_labels": [1, 2],
    }
    tokens = {f"{side}_{column}": [A, B] for side in ("chosen", "rejected") for column in COLUMNS}
    batch = PreferenceCollator(0, packing=True)([{**tokens, **names}, {**tokens, **names}])
    for name in ("annotator_labels", "chosen_labels_of", "human_labels", "packed"):
        assert batch[name] == [names[name]] * 2
    assert batch.packed() is not None
    # Numbers are padded, but they are no input of the model.
    assert set(concatenate(batch, False, 0, None)) == {f"concatenated_{name}" for name in COLUMNS}
