"""Tokenizers of different families, built without downloads.

Not called tokenizers.py: that name would hide the library of the same name from the tests.
"""

import random
import shutil
from functools import lru_cache
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% if tools %}[TOOLS]{{ tools | length }}:{{ tools[0]['name'] }}[/TOOLS]{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}</a>"
    "{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)

_SYLLABLES = "ka lo mi ter sun dre vol an is e qu'o ping pong the ing ed un der ly über né".split()
_SPICE = ["7", "2026", "don't", "naïve", "東京", "🙂", "a_b", "--", "(see", "e.g.)", "C++", "I"]


def random_words(rng: random.Random, count: int) -> str:
    """Words with capitals, digits, punctuation, line breaks and rare scripts."""
    words = []
    for _ in range(count):
        if rng.random() < 0.12:
            word = rng.choice(_SPICE)
        else:
            word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 3)))
            word = word.capitalize() if rng.random() < 0.1 else word
        words.append(word + rng.choice(["", "", "", "", ",", ".", "?", ":", "\n", "\n\n", "  "]))
    return " ".join(words)


@lru_cache(maxsize=1)
def _corpus() -> tuple[str, ...]:
    rng = random.Random(5)
    return tuple(random_words(rng, 40) for _ in range(300))


def _wrap(tokenizer: Tokenizer, **special: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """BPE over marked spaces, unknown characters as bytes; Llama's and Mistral's family."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=60)
    # Words only for the trainer: the finished tokenizer merges over spaces, as SentencePiece can.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.pre_tokenizer = None
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """BPE over bytes, without BOS; GPT-2's and Qwen's family."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return _wrap(tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def unigram() -> PreTrainedTokenizerFast:
    """Unigram language model that adds an EOS itself; T5's and XLNet's family."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "</s>", "<unk>", "<s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece after lower-casing, with [CLS] and [SEP] as BOS and EOS; BERT's family."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return _wrap(
        tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


FAMILIES = {
    "sentencepiece_bpe": sentencepiece_bpe,
    "byte_level_bpe": byte_level_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def mistral(folder: Path) -> LlamaTokenizer:
    """
    The tokenizer of Mistral-7B-v0.1, from the file in mistral-common.

    Raises:
        ImportError: If mistral-common is not installed.
    """
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(source, folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
