"""Preparing a tokenizer: padding, and a template for conversations."""

import pytest
from datasets import Dataset

from oddsmith.data.tokenizer import ensure_chat_template, ensure_pad_token
from support.word_tokenizer import TEMPLATE, bot, user


def test_pad_token_falls_back_to_eos_and_logs_it_once(tokenizer, log):
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


def test_conversations_get_a_template_and_strings_do_not(tokenizer, log):
    strings = Dataset.from_list([{"chosen": "a b"}])
    ensure_chat_template(tokenizer, strings)
    assert tokenizer.chat_template is None and not log.records
    conversations = Dataset.from_list([{"chosen": [user("a"), bot("b")]}])
    ensure_chat_template(tokenizer, conversations)
    assert "conversations are written as [INST] question [/INST] answer" in log.text
    said = tokenizer.apply_chat_template([user("a"), bot("b")], tokenize=False)
    assert said == "<s>[INST] a [/INST]b</s>"
    tokenizer.chat_template = TEMPLATE
    ensure_chat_template(tokenizer, conversations)
    assert tokenizer.chat_template == TEMPLATE and len(log.records) == 1
