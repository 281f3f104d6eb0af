"""Short training runs that the trainer's tests share."""

import copy
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from .generated_pairs import string_rows
from .models import MODELS, make_model
from .tokenizer_zoo import FAMILIES, random_words

__all__ = [
    "DECODERS",
    "MODELS",
    "arguments",
    "batch_of",
    "long_pairs",
    "make_model",
    "make_tokenizer",
    "pairs",
    "random_words",
    "train",
    "train_logs",
]

DECODERS = [name for name in MODELS if name != "t5"]


@lru_cache
def _trained_tokenizer(family: str) -> Any:
    # Training one takes a second, a copy ten milliseconds.
    tokenizer = FAMILIES[family]()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_tokenizer(model_name: str = "mistral") -> Any:
    """A tokenizer of the model's kind, with a pad token; a test may change it."""
    family = "unigram" if model_name == "t5" else "sentencepiece_bpe"
    return copy.deepcopy(_trained_tokenizer(family))


def pairs(count: int, seed: int = 3) -> Dataset:
    """Pairs of all lengths, each with its own prompt."""
    return Dataset.from_list(string_rows(count, seed, implicit=False))


def long_pairs(count: int, seed: int = 4) -> Dataset:
    """Pairs with a short prompt and answers of more than 24 tokens: cut to that, none is padded."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "prompt": random_words(rng, 1) + "\n",
                "chosen": random_words(rng, 40),
                "rejected": random_words(rng, 40),
            }
            for _ in range(count)
        ]
    )


def arguments(output_dir: Path, **changed: Any) -> dict[str, Any]:
    """Arguments of a short run that ORPOConfig and TRL's both take; no option at its neutral
    value."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "weight_decay": 0.02,
        "warmup_steps": 1,
        "logging_steps": 1,
        "beta": 0.3,
        "max_length": 96,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
        **changed,
    }


def train(
    trainer_class: type,
    config_class: type,
    model: Any,
    tokenizer: Any,
    train_dataset: Any,
    args: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """Train a copy of a model; returns the trainer."""
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=config_class(**args),
        train_dataset=train_dataset,
        processing_class=tokenizer,
        **kwargs,
    )
    trainer.train()
    return trainer


def batch_of(trainer: Any, size: int = 3) -> Any:
    """The first rows of a trainer's dataset, as a batch."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(size)])


def train_logs(trainer: Any) -> list[dict[str, float]]:
    """The training logs, step by step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
