"""A processor as `processing_class`: its tokenizer makes the tokens, its template the text; and the
classes that load it and its model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)


def tokenizer_of(processing_class: Any) -> Any:
    """
    The tokenizer of a processor; anything else is returned as it is.

    Raises:
        TypeError: If a processor has no tokenizer.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None:
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__} without a tokenizer; pass "
            "the AutoProcessor or AutoTokenizer of the model"
        )
    return tokenizer


def template_source(processing_class: Any) -> Any:
    """Who renders conversations: a processor with a chat template, or else the tokenizer."""
    if isinstance(processing_class, ProcessorMixin) and processing_class.chat_template is None:
        return tokenizer_of(processing_class)
    return processing_class


def takes_images(processing_class: Any) -> bool:
    """Whether it is a processor that makes pixel values."""
    is_processor = isinstance(processing_class, ProcessorMixin)
    return is_processor and getattr(processing_class, "image_processor", None) is not None


def as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Messages with their content as lists of parts, which templates of processors expect.

    Text `"Hi"` becomes `[{"type": "text", "text": "Hi"}]`, as in TRL. Keys without a value are left
    out of parts: Arrow gives every part the keys of all parts.
    """
    made = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif isinstance(content, Sequence):
            content = [
                {key: value for key, value in part.items() if value is not None}
                if isinstance(part, Mapping)
                else part
                for part in content
            ]
        made.append({**message, "content": content} if "content" in message else dict(message))
    return made


def image_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The parts of messages that stand for an image, in order."""
    return [
        part
        for message in messages
        if isinstance(message.get("content"), Sequence)
        for part in message["content"]
        if isinstance(part, Mapping) and part.get("type") == "image"
    ]


def is_image_text_config(config: Any) -> bool:
    """Whether transformers has an image-text model for a configuration."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: Any, images: bool) -> Any:
    """
    The class of transformers that loads a model by its name.

    Args:
        config (`PreTrainedConfig`): That of the model.
        images (`bool`): Whether the rows have images. If not, a model that transformers has as a
            causal language model is loaded as that, as in TRL: of some families (Qwen 3.5,
            Llama 4) without the vision part.
    """
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if is_image_text_config(config) and (images or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_processor(
    name: str, revision: str | None = None, trust_remote_code: bool = False, config: Any = None
) -> Any:
    """
    Load the processor of an image-text model, or the tokenizer of any other.

    If the parts of a processor cannot be loaded (they may need Pillow or torchvision), the
    tokenizer is loaded instead, with a line in the log; it is enough for rows of text.

    Args:
        name (`str`): Hub id or folder.
        revision (`str`, *optional*): Branch, tag or commit.
        trust_remote_code (`bool`, *optional*): Allow code from the repository.
        config (`PreTrainedConfig`, *optional*): That of the model; loaded if not given.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if config is None:
        try:
            config = AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError):  # a folder with a tokenizer alone
            config = None
    if not is_image_text_config(config):
        return AutoTokenizer.from_pretrained(name, **options)
    try:
        return AutoProcessor.from_pretrained(name, **options)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        reason = str(error).strip().partition("\n")[0]
        logger.warning_once(
            f"The processor of {name} cannot be loaded ({reason}): its tokenizer is used, for "
            "rows of text."
        )
        return tokenizer
