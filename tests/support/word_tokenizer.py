"""A tokenizer with one token per word, so that rows can be computed by hand."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# <pad> 0, <s> 1, </s> 2, then the letters from 3 on.
WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "<user>", "<bot>"]
TEMPLATE = (
    "{% for m in messages %}{{ ' <user> ' if m['role'] == 'user' else ' <bot> ' }}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ ' <bot> ' }}{% endif %}"
)


def word_tokenizer(
    words: Sequence[str] = WORDS,
    kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
    chat_template: str | None = None,
) -> Any:
    """A tokenizer of `words`; any other word is `<pad>`."""
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = kind(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = chat_template
    return made


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
