"""Makes a tokenizer ready for training: a padding token, and a chat template for conversations."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .chat import is_messages
from .layouts import Layout, find_layout, mapped_layout
from .standard_rows import first_rows

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


def ensure_chat_template(
    tokenizer: Any, dataset: Dataset, column_mapping: Mapping[str, str] | None = None
) -> None:
    """
    Set the fallback template if the rows are conversations and the tokenizer has none.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place.
        dataset (`Dataset`): Rows, not yet prepared.
        column_mapping (`Mapping[str, str]`, *optional*): The user's names of columns.

    Raises:
        ValueError: If the columns of the pair are not clear.
    """
    if tokenizer.chat_template is not None:
        return
    rows = first_rows(dataset)
    if column_mapping:
        layout = mapped_layout(column_mapping, dataset.column_names, "the dataset")
    else:
        layout = find_layout(rows) or Layout()
    if not is_messages(layout.row(rows[0])["chosen"]):
        return
    tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    logger.warning(
        "The tokenizer has no chat template: conversations are written as [INST] question [/INST] "
        "answer, and the saved tokenizer has that template; --chat_template FILE sets another."
    )
