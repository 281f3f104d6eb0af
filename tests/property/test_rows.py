"""Properties of rows for all texts and limits."""

from hypothesis import assume, given
from hypothesis import strategies as st

from oddsmith.data.chat import extract_prompt
from oddsmith.data.collator import PreferenceCollator
from oddsmith.data.rows import RowBuilder
from support.generated_texts import patiently, texts, tokenizer

SIDES = ("chosen", "rejected")


@st.composite
def cases(draw, with_max_prompt_length):
    """A builder, a row that can be split at its prompt, and how it looks before it is cut."""
    made = tokenizer(draw(st.sampled_from(["<s>", None])))
    max_length = draw(st.integers(2, 40))
    limits = {}
    if with_max_prompt_length:
        limits["max_prompt_length"] = draw(st.integers(1, max_length - 1))
        limits["truncation_mode"] = draw(st.sampled_from(["keep_end", "keep_start"]))
    feature = {name: draw(texts) for name in ("prompt", *SIDES)}
    try:
        whole = RowBuilder(made, 10**6).tokenize_row(feature)
    except ValueError:
        assume(False)
    return RowBuilder(made, max_length, **limits), feature, whole


def prompt_length(row, side):
    return sum(label == -100 for label in row[f"{side}_labels"])


def check_labels(row):
    """Labels mask exactly the prompt: a run at the start; after it they are the ids."""
    for side in SIDES:
        ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
        cut = prompt_length(row, side)
        assert labels == [-100] * cut + ids[cut:]
        assert row[f"{side}_attention_mask"] == [1] * len(ids)


@patiently
@given(cases(with_max_prompt_length=True))
def test_with_max_prompt_length_no_row_is_too_long_and_none_is_emptied(case):
    builder, feature, whole = case
    row = builder.tokenize_row(feature)
    check_labels(row)
    for side in SIDES:
        ids = row[f"{side}_input_ids"]
        assert len(ids) <= builder.max_length
        assert prompt_length(row, side) < len(ids)
    assert len(row["prompt_input_ids"]) <= builder.max_length
    assert builder.is_overlength(feature) == (row != whole)


@patiently
@given(cases(with_max_prompt_length=False))
def test_without_it_only_a_prompt_that_fills_max_length_costs_the_completion(case):
    builder, feature, whole = case
    row = builder.tokenize_row(feature)
    check_labels(row)
    for side in SIDES:
        ids, prompt = row[f"{side}_input_ids"], prompt_length(row, side)
        assert prompt == prompt_length(whole, side)  # the prompt is never cut
        assert ids == whole[f"{side}_input_ids"][: max(builder.max_length, prompt)]
        assert len(ids) <= max(builder.max_length, prompt)
        if prompt < builder.max_length:
            assert len(ids) > prompt
    assert builder.is_overlength(feature) == (row != whole)


@patiently
@given(cases(with_max_prompt_length=False))
def test_nothing_is_lost_and_the_mask_ends_where_the_prompt_does(case):
    builder, feature, whole = case
    made = builder.processing_class
    for side in SIDES:
        ids, cut = whole[f"{side}_input_ids"], prompt_length(whole, side)
        text = made.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text == feature["prompt"] + feature[side]
        # At most one token of the prompt belongs to the answer, and no token of the answer to the
        # prompt.
        alone = made(feature["prompt"], add_special_tokens=False)["input_ids"]
        bos = made.bos_token_id is not None
        assert cut - bos in (len(alone), len(alone) - 1)
        assert ids[0] == made.bos_token_id or not bos
        assert ids[-1] == made.eos_token_id


@patiently
@given(st.lists(cases(with_max_prompt_length=True), min_size=1, max_size=4))
def test_a_batch_of_rows_is_the_rows(drawn):
    builder = drawn[0][0]
    kept = [
        feature for other, feature, _ in drawn if other.processing_class is builder.processing_class
    ]
    rows, overlength = builder.tokenize_batch(
        *([feature[name] for feature in kept] for name in ("prompt", *SIDES))
    )
    assert rows == [builder.tokenize_row(feature) for feature in kept]
    assert overlength == [builder.is_overlength(feature) for feature in kept]


@patiently
@given(st.lists(cases(with_max_prompt_length=False), min_size=1, max_size=4))
def test_collating_only_adds_padding(drawn):
    rows = [builder.tokenize_row(feature) for builder, feature, _ in drawn]
    batch = PreferenceCollator(pad_token_id=7, label_pad_token_id=-5)(rows)
    assert set(batch) == set(rows[0])
    pads = {"input_ids": 7, "attention_mask": 0, "labels": -5}
    for name, padded in batch.items():
        pad = pads[name.split("_", 1)[1]]
        longest = max(len(row[name]) for row in rows)
        for ids, row in zip(padded.tolist(), rows, strict=True):
            filling = [pad] * (longest - len(row[name]))
            left = name.startswith("prompt")
            assert ids == (filling + row[name] if left else row[name] + filling)


@patiently
@given(texts, texts, texts)
def test_extraction_takes_nothing_away(prompt, chosen, rejected):
    chosen, rejected = prompt + chosen, prompt + rejected
    shared, a, b = extract_prompt(chosen, rejected)
    assert (shared + a, shared + b) == (chosen, rejected)
    assert len(shared) >= len(prompt) - 1
    # The answers share no first character except a space, or the last one of the shorter side.
    if a[:1] == b[:1] != "":
        assert a[0] == " " or 1 in (len(a), len(b))
