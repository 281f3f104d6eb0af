"""Rows are TRL 1.16's, token for token."""

import gzip
import json
import os

import pytest
from datasets import Dataset

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from oddsmith.data.chat import extract_prompt, row_text
from oddsmith.data.collator import PreferenceCollator
from oddsmith.data.dataset import prepare_dataset
from oddsmith.data.rows import RowBuilder
from support.generated_pairs import conversation_rows, string_rows
from support.tokenizer_zoo import FAMILIES, mistral

pytest.importorskip("trl.experimental.orpo", reason="trl, the peer, is not installed")

import torch
from accelerate import PartialState
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo import ORPOTrainer as TRLTrainer
from trl.experimental.utils import DPODataCollatorWithPadding

from support.paths import SHARED

FILES = ("alpacaeval_mistral_orpo.jsonl.gz", "hh_harmless_test_head.jsonl.gz")
TOKENIZERS = [*FAMILIES, "mistral"]

# TRL adds this for BERT-like tokenizers without using it.
UNUSED_BY_TRL = {"prompt_token_type_ids"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            if name == "mistral":
                pytest.importorskip("mistral_common", reason="brings the tokenizer of Mistral-7B")
                made[name] = mistral(tmp_path_factory.mktemp("mistral"))
            else:
                made[name] = FAMILIES[name]()
        return made[name]

    return get


def trl_trainer(tokenizer, max_length, is_encoder_decoder=False, max_completion_length=None):
    PartialState()  # TRL's logger requires this
    trainer = TRLTrainer.__new__(TRLTrainer)  # tokenising does not need __init__
    trainer.processing_class = tokenizer
    trainer.max_length = max_length
    trainer.is_encoder_decoder = is_encoder_decoder
    trainer.max_completion_length = max_completion_length
    trainer.padding_value = tokenizer.pad_token_id
    return trainer


def trl_rows(trainer, rows):
    """TRL's rows; None where TRL raises ValueError."""
    made = []
    for row in rows:
        text = maybe_apply_chat_template(maybe_extract_prompt(dict(row)), trainer.processing_class)
        try:
            tokens = trainer.tokenize_row(text)
        except ValueError:
            made.append(None)
            continue
        fields = {key: text[key] for key in ("prompt", "chosen", "rejected")}
        tokens = {key: value for key, value in tokens.items() if key not in UNUSED_BY_TRL}
        made.append({**fields, **tokens})
    return made


def our_rows(builder, rows):
    made = []
    for row in rows:
        text = row_text(row, builder.processing_class, "row")
        feature = dict(zip(("prompt", "chosen", "rejected"), text, strict=True))
        try:
            made.append({**feature, **builder.tokenize_row(feature)})
        except ValueError:
            made.append(None)
    return made


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a == b, f"row {index}"


FORMS = {
    "strings": lambda: string_rows(120, seed=1, implicit=False),
    "strings_implicit": lambda: string_rows(120, seed=2, implicit=True),
    "conversations": lambda: conversation_rows(60, seed=3, implicit=False),
    "conversations_implicit": lambda: conversation_rows(60, seed=4, implicit=True),
}


@pytest.mark.parametrize("max_length", [1024, 23])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_generated_rows(tokenizers, name, form, max_length):
    tokenizer, rows = tokenizers(name), FORMS[form]()
    theirs = trl_rows(trl_trainer(tokenizer, max_length), rows)
    assert_same(our_rows(RowBuilder(tokenizer, max_length), rows), theirs)

    # The dataset takes the batched path, which raises where TRL does, so give it the other rows.
    kept = [index for index, row in enumerate(theirs) if row is not None]
    assert len(kept) > len(rows) // 2
    builder = RowBuilder(tokenizer, max_length)
    prepared = prepare_dataset(
        Dataset.from_list([rows[index] for index in kept]), tokenizer, builder.tokenize_row
    )
    assert_same(list(prepared), [theirs[index] for index in kept])


def test_generated_rows_reach_the_awkward_cases(tokenizers):
    """The rows above do merge over the boundary, lose their answers, and make TRL raise."""
    tokenizer = tokenizers("byte_level_bpe")
    theirs = trl_rows(trl_trainer(tokenizer, 23), FORMS["strings_implicit"]())
    assert None in theirs
    rows = [row for row in theirs if row is not None]
    assert any(max(row["chosen_labels"]) == -100 for row in rows)
    merged = 0
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        merged += row["chosen_input_ids"][: len(prompt)] != prompt
    assert merged > 0


@pytest.mark.parametrize("max_length", [1024, 160])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("file", FILES)
def test_real_rows(tokenizers, file, name, max_length):
    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip(f"needs {file} in the folder that ODDSMITH_SHARED names")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if name != "mistral" or max_length < 1024:
        rows = rows[::4]  # every row once is enough
    tokenizer = tokenizers(name)
    theirs = trl_rows(trl_trainer(tokenizer, max_length), rows)
    assert sum(row is not None for row in theirs) > len(rows) // 2
    assert_same(our_rows(RowBuilder(tokenizer, max_length), rows), theirs)


def test_chat_templates_with_tools_and_unfinished_answers(tokenizers):
    tokenizer = tokenizers("unigram")
    tools = [{"name": "weather", "parameters": {"city": "string"}}, {"name": "clock"}]
    rows = conversation_rows(20, seed=5, implicit=False)
    for index, row in enumerate(rows):
        if index % 2:
            row["prompt"] = [*row["prompt"], {"role": "assistant", "content": "Well, that"}]
        else:
            row["prompt"] = [*row["prompt"], {"role": "tool", "content": "21 degrees"}]
    for row in rows:
        theirs = maybe_apply_chat_template(row, tokenizer, tools)
        assert "[TOOLS]2:weather[/TOOLS]" in theirs["prompt"]
        for given in (tools, json.dumps(tools)):
            ours = row_text({**row, "tools": given}, tokenizer, "row")
            assert ours == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@pytest.mark.parametrize("bos, eos", [(None, "</s>"), ("<s>", "</s>"), ("</s>", "</s>")])
def test_special_tokens(bos, eos):
    """No BOS id; BOS and EOS written in the text already; one token for both."""
    tokenizer = FAMILIES["sentencepiece_bpe"]()
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    rows = [
        {"prompt": "", "chosen": "loka", "rejected": "mi"},
        {"prompt": "<s>ka lo", "chosen": " mi</s>", "rejected": " ter"},
        {"prompt": "<s>", "chosen": "", "rejected": "</s>"},
        {"prompt": "ka</s>", "chosen": "</s>", "rejected": ""},
    ]
    theirs = trl_rows(trl_trainer(tokenizer, 9), rows)
    assert None not in theirs
    assert_same(our_rows(RowBuilder(tokenizer, 9), rows), theirs)


def test_without_eos_trl_appends_none_and_we_append_nothing():
    tokenizer = FAMILIES["byte_level_bpe"]()
    tokenizer.eos_token = None
    rows = string_rows(10, seed=8, implicit=False)
    theirs = trl_rows(trl_trainer(tokenizer, 1024), rows)
    for ours, their in zip(our_rows(RowBuilder(tokenizer), rows), theirs, strict=True):
        for side in ("chosen", "rejected"):
            assert [*ours[f"{side}_input_ids"], None] == their[f"{side}_input_ids"]


@pytest.mark.parametrize("limit", [128, 7])
def test_encoder_decoder_rows(tokenizers, limit):
    tokenizer = tokenizers("unigram")
    rows = string_rows(40, seed=9, implicit=False)
    theirs = trl_rows(trl_trainer(tokenizer, 1024, True, limit), rows)
    builder = RowBuilder(tokenizer, 1024, is_encoder_decoder=True, max_completion_length=limit)
    assert_same(our_rows(builder, rows), theirs)
    prepared = prepare_dataset(Dataset.from_list(rows), tokenizer, builder.tokenize_row)
    assert_same(list(prepared), theirs)


def naive_prompt_length_rule(tokenizer, row, max_length, max_prompt_length, truncation_mode):
    """TRL up to 0.27, on plain lists: prompt first, then answers, by the longer answer."""
    builder = RowBuilder(tokenizer, 10**6)
    sides = {}
    for side in ("chosen", "rejected"):
        split = builder.build_tokenized_answer(row["prompt"], row[side])
        prompt, answer = split["prompt_input_ids"], split["input_ids"]
        if tokenizer.bos_token_id is not None and prompt[:1] != [tokenizer.bos_token_id]:
            prompt = [tokenizer.bos_token_id] + prompt
        if answer[-1:] != [tokenizer.eos_token_id]:
            answer = answer + [tokenizer.eos_token_id]
        sides[side] = (prompt, answer)
    longer = max(len(answer) for _, answer in sides.values())
    cut = {}
    for side, (prompt, answer) in sides.items():
        if len(prompt) + longer > max_length:
            if truncation_mode == "keep_end":
                prompt = prompt[max(0, len(prompt) - max_prompt_length) :]
            else:
                prompt = prompt[:max_prompt_length]
        if len(prompt) + longer > max_length:
            answer = answer[: max_length - max_prompt_length]
        cut[side] = (prompt, answer)
    return cut


@pytest.mark.parametrize("truncation_mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("max_length, max_prompt_length", [(40, 11), (40, 39), (1024, 512)])
@pytest.mark.parametrize("name", FAMILIES)
def test_max_prompt_length(tokenizers, name, max_length, max_prompt_length, truncation_mode):
    tokenizer = tokenizers(name)
    builder = RowBuilder(tokenizer, max_length, max_prompt_length, truncation_mode)
    cut = 0
    for row in string_rows(60, seed=6, implicit=False):
        row["prompt"] += "\n"
        spec = naive_prompt_length_rule(
            tokenizer, row, max_length, max_prompt_length, truncation_mode
        )
        made = builder.tokenize_row(row)
        for side, (prompt, answer) in spec.items():
            assert made[f"{side}_input_ids"] == prompt + answer
            assert made[f"{side}_labels"] == [-100] * len(prompt) + answer
            assert made[f"{side}_attention_mask"] == [1] * len(prompt + answer)
        cut += builder.is_overlength(row)
    assert (cut > 0) == (max_length == 40)


def test_prompt_extraction_where_nothing_is_shared():
    """TRL's index wraps around if the chosen text ends in a space: the only difference."""
    row = {"chosen": "yes ", "rejected": "no"}
    assert maybe_extract_prompt(row) == {"prompt": "yes", "chosen": " ", "rejected": "o"}
    assert extract_prompt(row["chosen"], row["rejected"]) == ("", "yes ", "no")


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_collator(tokenizers, is_encoder_decoder):
    tokenizer = tokenizers("unigram")
    rows = string_rows(5, seed=7, implicit=False)
    builder = RowBuilder(tokenizer, 60, is_encoder_decoder=is_encoder_decoder)
    features = our_rows(builder, rows)
    ours = PreferenceCollator(tokenizer.pad_token_id, is_encoder_decoder=is_encoder_decoder)
    theirs = DPODataCollatorWithPadding(tokenizer.pad_token_id, is_encoder_decoder)
    ours, theirs = ours(features), theirs(features)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0)
        else:
            assert ours[key] == value
