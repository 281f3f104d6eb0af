"""Rows with images: their tokens, where images go, and what is refused."""

import pytest

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith.data.image_rows import ImageRows, PromptTooLong, image_token_ids, place_images
from oddsmith.data.rows import RowBuilder
from support.image_models import IMAGE_MODELS, image_model, image_pairs, picture
from support.word_tokenizer import bot, user, word_tokenizer

PAIR = {"prompt": [user("ab")], "chosen": [bot("cd")], "rejected": [bot("e")]}


def rows_of(name="llava", max_length=64, max_prompt_length=None):
    _, processor = image_model(name)
    return ImageRows(processor, RowBuilder(processor.tokenizer, max_length, max_prompt_length))


def one(rows, **row):
    return rows.build([{**PAIR, **row}], ["row 0"])


def test_tokens_of_a_row():
    rows = rows_of()
    batch = one(rows, images=[picture(1)])
    ids = rows.processor.tokenizer.convert_ids_to_tokens(batch.rows[0]["chosen_input_ids"])
    # A picture of 16 x 16 pixels has 4 x 4 patches.
    assert ids == ["<s>", "<user>", *["<image>"] * 16, "a", "b", "<bot>", "c", "d", "</s>"]
    assert batch.rows[0]["chosen_labels"] == [-100] * 21 + batch.rows[0]["chosen_input_ids"][-3:]
    assert batch.rows[0]["prompt_input_ids"] == batch.rows[0]["rejected_input_ids"][:-2]
    assert batch.rows[0]["prompt"] == "<user><image>ab<bot>"
    assert batch.images == [1] and batch.overlength == [False]
    assert batch.inputs["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_prompts_are_those_of_the_processor(name):
    rows = rows_of(name)
    batch = rows.build(list(image_pairs(6)), [f"row {i}" for i in range(6)])
    for row, made in zip(image_pairs(6), batch.rows, strict=True):
        if not row["images"]:
            continue
        text = made["prompt"]
        alone = rows.processor(images=[row["images"]], text=[text], add_special_tokens=False)
        expected = [rows.processor.tokenizer.bos_token_id, *alone["input_ids"][0]]
        assert made["prompt_input_ids"] == expected
        for kind in ("token_type_ids", "mm_token_type_ids"):
            if kind in alone:
                length = len(made["chosen_input_ids"]) - len(expected)
                types = [0, *alone[kind][0]]
                assert made[f"prompt_{kind}"] == types
                assert made[f"chosen_{kind}"] == types + [0] * length


def test_a_row_of_text_has_the_tokens_of_the_builder():
    rows = rows_of("gemma3")
    batch = rows.build([{**PAIR, "images": []}, {**PAIR, "images": [picture(1)]}], ["a", "b"])
    expected = rows.builder.tokenize_row(
        {"prompt": "<user>ab<bot>", "chosen": "cd", "rejected": "e"}
    )
    assert {name: batch.rows[0][name] for name in expected} == expected
    assert batch.rows[0]["chosen_token_type_ids"] == [0] * len(expected["chosen_input_ids"])
    text = rows.build([{**PAIR, "images": None}], ["a"])
    assert text.inputs == {} and "chosen_token_type_ids" not in text.rows[0]


def test_strings_and_implicit_prompts():
    rows = rows_of()
    whole = one(rows, image=picture(1)).rows
    assert (
        one(rows, prompt="<user><image>ab<bot>", chosen="cd", rejected="e", image=picture(1)).rows
        == whole
    )
    sides = {side: PAIR["prompt"] + PAIR[side] for side in ("chosen", "rejected")}
    assert rows.build([{**sides, "image": picture(1)}], ["row 0"]).rows == whole


def test_answers_are_cut_and_prompts_are_not():
    rows = rows_of(max_length=22)
    batch = one(rows, image=picture(1))
    assert batch.overlength == [True]
    assert len(batch.rows[0]["chosen_input_ids"]) == 22
    assert not rows.fits({**PAIR, "image": picture(1)}, "row 0")
    rows = rows_of(max_length=22, max_prompt_length=10)
    with pytest.raises(
        PromptTooLong,
        match="row 0: the prompt has 21 tokens with its images, more than max_prompt_length 10",
    ):
        one(rows, image=picture(1))
    assert not rows.fits({**PAIR, "image": picture(1)}, "row 0")
    assert rows.fits({**PAIR, "images": []}, "row 0")
    # Enough for the prompt: only answers are cut.
    rows = rows_of(max_length=23, max_prompt_length=21)
    assert len(one(rows, image=picture(1)).rows[0]["chosen_input_ids"]) == 23


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "ab", "chosen": "c", "rejected": "d"}, "0 times '<image>' and the row 1 images"),
        ({"prompt": "<image>", "chosen": "<image>", "rejected": "d"}, "an answer has '<image>'"),
        ({"prompt": [user([{"type": "text", "text": "a"}])]}, "0 image parts and the row 1 images"),
        ({"prompt": [user([{"type": "image", "url": "x"}])]}, "image inside a message .url"),
        ({"prompt": [bot("a")]}, "0 image parts and the row 1 images"),
    ],
)  # fmt: skip
def test_faults(row, message):
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        one(rows_of(), image=picture(1), **row)


def test_place_images():
    two = [{"type": "image"}, {"type": "image"}]
    found = place_images([bot("x"), user("a"), user("b")], 2, "row 0")
    assert found[1]["content"] == [*two, {"type": "text", "text": "a"}]
    assert found[2]["content"] == [{"type": "text", "text": "b"}]
    own = [{"role": "user", "content": [{"type": "text", "text": "a"}, *two]}]
    assert place_images(own, 2, "row 0") == own
    assert place_images([user("a")], 0, "row 0")[0]["content"] == [{"type": "text", "text": "a"}]


def test_what_makes_no_pixel_values():
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="pass AutoProcessor"):
        ImageRows(tokenizer, RowBuilder(tokenizer))


def test_encoder_decoders():
    _, processor = image_model("llava")
    builder = RowBuilder(processor.tokenizer, is_encoder_decoder=True, max_completion_length=8)
    with pytest.raises(ValueError, match="encoder-decoder; not supported"):
        ImageRows(processor, builder)


def test_a_template_is_needed_for_conversations():
    rows = rows_of()
    rows.processor.chat_template = None
    with pytest.raises(ValueError, match="row 0 is a conversation with images.*chat template"):
        one(rows, image=picture(1))


def test_ids_that_stand_for_images():
    _, processor = image_model("mistral3")
    names = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    expected = processor.tokenizer.convert_tokens_to_ids(names)
    assert image_token_ids(processor) == set(expected)


def test_inputs_for_each_token_are_refused(monkeypatch):
    rows = rows_of()
    process = type(rows.processor).__call__

    def call(self, *args, **kwargs):
        made = process(self, *args, **kwargs)
        made["cross_attention_mask"] = made["input_ids"]
        return made

    monkeypatch.setattr(type(rows.processor), "__call__", call)
    with pytest.raises(ValueError, match="returns cross_attention_mask, which is not supported"):
        one(rows, image=picture(1))


def test_a_prompt_string_before_messages():
    rows = rows_of()
    given = one(rows, prompt="ab", images=[picture(1)])
    assert given.rows == one(rows, images=[picture(1)]).rows
