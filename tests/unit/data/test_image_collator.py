"""Batches of rows with images: padding, token types, and what the model gets."""

import pytest
import torch

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith.data.collator import PreferenceCollator
from oddsmith.data.image_collator import ImageCollator, both_sides, model_inputs
from oddsmith.data.image_rows import ImageRows
from oddsmith.data.rows import RowBuilder
from oddsmith.head.logits import concatenate
from support.image_models import image_model, image_pairs, picture


def collator(name, max_length=64):
    _, processor = image_model(name)
    builder = RowBuilder(processor.tokenizer, max_length)
    pad = PreferenceCollator(processor.tokenizer.pad_token_id)
    return ImageCollator(ImageRows(processor, builder), pad)


def test_images_once_for_each_sequence():
    make = collator("qwen2_5_vl")
    rows = [{**row, "note": index} for index, row in enumerate(image_pairs(4))]
    batch = make(rows)
    images = model_inputs(batch)
    assert set(images) == {"pixel_values", "image_grid_thw"}
    assert len(images["image_grid_thw"]) == sum(len(row["images"]) for row in rows) == 4
    assert "images" not in batch and batch["note"] == [0, 1, 2, 3]
    assert batch["prompt"][2].startswith("<user>")
    both = both_sides(batch, concatenate(batch, False, 0, torch.device("cpu")))
    assert torch.equal(both["image_grid_thw"], torch.cat([images["image_grid_thw"]] * 2))
    types, ids = both["mm_token_type_ids"], torch.cat([batch["chosen_input_ids"]])
    image = make.rows.processor.image_token_id
    assert torch.equal(types[:4, : ids.shape[1]] == 1, ids == image)
    # As many image tokens on each side as the model makes of the images.
    tokens = both["image_grid_thw"].prod(dim=1).sum() // 4
    assert (types == 1).sum() == tokens


def test_prompts_are_padded_on_the_left():
    batch = collator("gemma3")(list(image_pairs(4)))
    ids, types = batch["prompt_input_ids"], batch["prompt_token_type_ids"]
    assert types.shape == ids.shape
    assert (batch["prompt_attention_mask"][:, -1] == 1).all()
    image = image_model("gemma3")[1].tokenizer.image_token_id
    assert torch.equal(types == 1, ids == image)


def test_a_batch_of_text():
    rows = [{**row, "images": []} for row in image_pairs(2)]
    batch = collator("gemma3")(rows)
    assert model_inputs(batch) == {}
    assert both_sides(batch, concatenate(batch, False, 0, torch.device("cpu"))) == {}


def test_moved_with_the_batch():
    moved = collator("llava")(list(image_pairs(2))).to("meta")
    assert model_inputs(moved)["pixel_values"].device.type == "meta"


def test_a_fault_has_the_prompt():
    rows = [{**row, "images": [7]} for row in image_pairs(1)]
    with pytest.raises(ValueError, match=r"the row with prompt \[\{.*images\[0\] is a int"):
        collator("llava")(rows)


def test_a_prompt_that_fills_the_row_is_said(caplog):
    collator("llava", max_length=12)([{**image_pairs(1)[0], "images": [picture(1)]}])
    assert "has no completion tokens within max_length 12" in caplog.text


def test_the_same_prompts_and_pixels_as_trl():
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl, the peer, is not installed")
    for name in ("qwen2_5_vl", "gemma3", "llava"):
        make = collator(name)
        rows = [image_pairs(4)[index] for index in (0, 1, 3)]
        theirs = trl.DataCollatorForVisionPreference(make.rows.processor)(
            [{key: list(value) for key, value in row.items()} for row in rows]
        )
        batch = make(rows)
        both = concatenate(batch, False, make.pad.pad_token_id, torch.device("cpu"))
        inputs = both_sides(batch, both)
        for key in ("pixel_values", "image_grid_thw"):
            assert (key in theirs) == (key in inputs)
            if key in theirs:
                assert torch.equal(theirs[key], inputs[key])
        masks = both["concatenated_attention_mask"], theirs["attention_mask"]
        columns = both["concatenated_input_ids"], theirs["input_ids"]
        for ours, peer, real, its in zip(*columns, *masks, strict=True):
            # Ours have BOS and EOS in addition, as TRL's ORPOTrainer adds them.
            assert ours[real == 1][1:-1].tolist() == peer[its == 1].tolist()
        for kind in ("token_type_ids", "mm_token_type_ids"):
            assert (kind in theirs) == (kind in inputs)
            if kind in theirs:
                for ours, peer in zip(inputs[kind], theirs[kind], strict=True):
                    assert ours.nonzero().flatten().tolist() == [
                        place + 1 for place in peer.nonzero().flatten().tolist()
                    ]
