"""Makes a tokenizer ready for training: a padding token, and a chat template for conversations."""

from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .chat import is_messages

logger = logging.get_logger(__name__)


def ensure_pad_token(processing_class: Any) -> int:
    """
    Use the EOS token for padding if a tokenizer has no pad token, and log it once.

    Args:
        processing_class (`PreTrainedTokenizerBase`): The tokenizer; changed in place.

    Returns:
        `int`: Id of the pad token.

    Raises:
        ValueError: If there is no EOS token either.
    """
    pad_token_id: Any = processing_class.pad_token_id
    if pad_token_id is None:
        pad_token_id = processing_class.eos_token_id
        if pad_token_id is None:
            raise ValueError(
                "the tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token"
            )
        processing_class.pad_token = processing_class.eos_token
        logger.warning_once(
            "The tokenizer has no pad token: padding with its EOS token "
            f"{processing_class.eos_token!r}."
        )
    return pad_token_id


# Mistral's layout, for base models without a template. It uses the special tokens of the tokenizer,
# so that each is one token in every model.
FALLBACK_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)


def ensure_chat_template(tokenizer: Any, dataset: Dataset) -> None:
    """Sets the fallback template if the rows are conversations and the tokenizer has none."""
    if tokenizer.chat_template is not None or not is_messages(dataset[0]["chosen"]):
        return
    tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    logger.warning(
        "The tokenizer has no chat template: conversations are written as [INST] question [/INST] "
        "answer, and the saved tokenizer has that template; --chat_template FILE sets another."
    )
