"""A processor as processing_class: its tokenizer, its template, and loading."""

import json

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ProcessorMixin,
    T5Config,
)

from oddsmith.data.chat import row_text
from oddsmith.data.processor import (
    as_parts,
    auto_class,
    image_parts,
    is_image_text_config,
    load_processor,
    takes_images,
    template_source,
    tokenizer_of,
)
from support.image_models import image_model
from support.models import make_model
from support.word_tokenizer import TEMPLATE, bot, user, word_tokenizer


@pytest.fixture(scope="module")
def llava():
    return image_model("llava")


def test_the_tokenizer_of_a_processor(llava):
    _, processor = llava
    assert tokenizer_of(processor) is processor.tokenizer
    assert takes_images(processor)
    plain = word_tokenizer()
    assert tokenizer_of(plain) is plain
    assert not takes_images(plain)


def test_a_processor_without_a_tokenizer():
    class Empty(ProcessorMixin):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="Empty without a tokenizer"):
        tokenizer_of(Empty())


def test_content_as_parts():
    found = as_parts([user("a"), {"role": "assistant", "content": None}, {"role": "tool"}])
    assert found[0] == {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert found[1:] == [{"role": "assistant", "content": None}, {"role": "tool"}]
    # Arrow gives each part the keys of all.
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "a"}]
    found = as_parts([{"role": "user", "content": parts}])
    assert found[0]["content"] == [{"type": "image"}, {"type": "text", "text": "a"}]
    assert image_parts(found) == [{"type": "image"}]


def test_the_template_of_the_processor_is_used(llava):
    _, processor = llava
    row = {"prompt": [user("ab")], "chosen": [bot("c")], "rejected": [bot("d")]}
    assert row_text(row, processor, "row 0") == ("<user>ab<bot>", "c", "d")


def test_without_one_that_of_its_tokenizer():
    _, processor = image_model("llava")
    processor.chat_template, processor.tokenizer.chat_template = None, TEMPLATE
    assert template_source(processor) is processor.tokenizer
    row = {"prompt": [user("ab")], "chosen": [bot("c")], "rejected": [bot("d")]}
    assert row_text(row, processor, "row 0") == (" <user> ab <bot> ", "c", "d")
    processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="row 0: .*no chat template"):
        row_text(row, processor, "row 0")


def test_an_image_part_without_an_image(llava):
    _, processor = llava
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    row = {"prompt": prompt, "chosen": [bot("c")], "rejected": [bot("d")]}
    with pytest.raises(ValueError, match="row 0: .*put them into a column images"):
        row_text(row, processor, "row 0")


def test_load_processor(llava, tmp_path):
    model, processor = llava
    model.config.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    assert is_image_text_config(model.config)
    assert type(load_processor(str(tmp_path / "whole"))) is type(processor)
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert not isinstance(load_processor(str(tmp_path / "tokenizer")), ProcessorMixin)


def test_a_processor_that_cannot_be_loaded(llava, tmp_path, caplog):
    model, processor = llava
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    # transformers raises an ImportError that names the missing package.
    settings = tmp_path / "processor_config.json"
    content = json.loads(settings.read_text())
    content["image_processor"]["image_processor_type"] = "NoSuchImageProcessor"
    settings.write_text(json.dumps(content))
    found = load_processor(str(tmp_path))
    assert type(found) is type(AutoTokenizer.from_pretrained(str(tmp_path)))
    assert "its tokenizer is used, for rows of text" in caplog.text


def test_the_class_that_loads_a_model():
    text, images = AutoModelForCausalLM, AutoModelForImageTextToText
    llava, gemma3 = (image_model(name)[0].config for name in ("llava", "gemma3"))
    assert auto_class(llava, False) is images  # transformers has no causal class for it
    assert auto_class(gemma3, False) is text and auto_class(gemma3, True) is images
    assert auto_class(T5Config(), True) is AutoModelForSeq2SeqLM
    assert auto_class(make_model("llama", word_tokenizer()).config, True) is text
