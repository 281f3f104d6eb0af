"""Texts and a tokenizer for tests on generated input."""

from functools import lru_cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# A slow machine is not a failure.
patiently = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Few letters, so that tokens merge over every boundary, and characters outside all vocabularies.
texts = st.text(st.sampled_from("ab the\n.é🙂"), max_size=24) | st.text(max_size=12)


@lru_cache(maxsize=2)
def tokenizer(bos):
    """Byte-level BPE: every text can be encoded without loss."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the tab hate bath", "ab ab the at a bat", "et. the\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token="</s>")
