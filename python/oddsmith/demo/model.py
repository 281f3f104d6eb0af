"""Creates a tokenizer and a Mistral-shaped model, small enough to train on two CPU cores."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

# The layout of Mistral's instruct models, with the BOS written by the template: the trainer adds
# one only if it is missing, and texts encoded outside the trainer get it too.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 352) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with Mistral's special tokens and a chat template.

    Args:
        texts (`Iterable[str]`): The corpus.
        vocab_size (`int`, *optional*, defaults to 352): Upper bound; the 256 bytes and 6 special
            tokens are always included, so any text can be encoded.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    # One token per digit: a merged "17" would hide the digits that the model has to add.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    max_position_embeddings: int = 256,
) -> MistralForCausalLM:
    """Builds a randomly initialised Mistral with the tokenizer's vocabulary.

    The proportions are Mistral-7B's: four query heads per key-value head, an intermediate size of
    3.5 times the hidden size, no tied embeddings.
    """
    # One id each; the tokenizer's attributes are typed for lists of them too.
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=max_position_embeddings,
        sliding_window=None,
        tie_word_embeddings=False,
        # The default, 0.02, suits a hidden size of thousands; at 128, attention stays flat and the
        # model does not learn to copy for a thousand steps. With 1 / sqrt(hidden_size) it takes a
        # few hundred.
        initializer_range=hidden_size**-0.5,
        **ids,
    )
    return MistralForCausalLM(config)
