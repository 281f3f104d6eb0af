"""Tokenizers without a backend in Rust: two steps are TRL's.

With tiktoken, as in the code of Qwen 1 and ChatGLM, and mistral-common's own; both come with mistral-common.
"""

import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from oddsmith import ORPOConfig, ORPOTrainer
from support.trainer_runs import arguments, train, train_logs

trl = pytest.importorskip("trl.experimental.orpo", reason="trl, the peer, is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [
    {"prompt": f"What is the thing {i}?", "chosen": f" Über {i * 7}.", "rejected": f" No {i}, the"}
    for i in range(6)
]
CHATS = [
    {
        key: [{"role": "user" if key == "prompt" else "assistant", "content": text}]
        for key, text in row.items()
    }
    for row in ROWS
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MERGES = (b"th", b"he", b"in", b"the", b" the", b"is", b" is")
SPECIAL = {"<end>": 256 + len(MERGES), "<pad>": 257 + len(MERGES)}


class Bytes(PreTrainedTokenizer):
    """One token for each byte."""

    def __init__(self, **kwargs):
        super().__init__(eos_token="<end>", pad_token="<pad>", **kwargs)
        self.chat_template = TEMPLATE

    @property
    def vocab_size(self):
        return len(self.get_vocab())

    def get_vocab(self):
        return {**{str(i): i for i in range(256 + len(MERGES))}, **SPECIAL}

    def _tokenize(self, text, **kwargs):
        return [str(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index):
        return next(token for token, each in self.get_vocab().items() if each == index)


class Tiktoken(Bytes):
    """Ranks of merged bytes, by tiktoken."""

    def _tokenize(self, text, **kwargs):
        import tiktoken

        ranks = {bytes([byte]): byte for byte in range(256)}
        ranks |= {merge: 256 + index for index, merge in enumerate(MERGES)}
        made = tiktoken.Encoding(
            "own", pat_str=r"\s?\w+|\s?[^\w\s]+|\s+", mergeable_ranks=ranks, special_tokens=SPECIAL
        )
        return [str(index) for index in made.encode_ordinary(text)]


def mistral(file):
    mistral_common = pytest.importorskip("mistral_common")
    backend = pytest.importorskip("transformers.tokenization_mistral_common")
    return backend.MistralCommonBackend(str(Path(mistral_common.__file__).parent / "data" / file))


def tiktoken():
    pytest.importorskip("tiktoken")
    made = Tiktoken()
    assert len(made("the thing is the")["input_ids"]) < 12  # merges are used
    return made


TOKENIZERS = {
    "Python": Bytes,
    "tiktoken": tiktoken,
    "mistral-common, SentencePiece": lambda: mistral("tokenizer.model.v1"),
    "mistral-common, Tekken": lambda: mistral("tekken_240911.json"),
}


def both(tokenizer, rows, folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))
    args = arguments(folder, max_steps=2, max_length=40, gradient_checkpointing=False)
    rows = Dataset.from_list(rows)
    ours = train(ORPOTrainer, ORPOConfig, model, tokenizer, rows, args)
    theirs = train(trl.ORPOTrainer, trl.ORPOConfig, model, tokenizer, rows, args)
    return ours, theirs


def assert_same(ours, theirs):
    mine, peers = train_logs(ours), train_logs(theirs)
    assert len(mine) == len(peers) == 2
    for one, other in zip(mine, peers, strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text(name, tmp_path):
    assert_same(*both(TOKENIZERS[name](), ROWS, tmp_path))


@pytest.mark.parametrize("name", ["Python", "tiktoken"])
def test_conversations(name, tmp_path):
    assert_same(*both(TOKENIZERS[name](), CHATS, tmp_path))


def test_conversations_that_mistral_common_cannot_render(tmp_path):
    # Those that end with an answer, in either of its modes.
    tokenizer = mistral("tokenizer.model.v1")
    with pytest.raises(ValueError, match="no text of a conversation that ends with an answer"):
        both(tokenizer, CHATS, tmp_path)
