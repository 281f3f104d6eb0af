"""What unit tests share."""

import logging

import pytest


@pytest.fixture
def log(caplog):
    """The log; messages that are logged once can be logged again."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger().warning_once.__func__.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def tokenizer():
    from support.trainer_runs import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    from support.trainer_runs import make_model

    return make_model("mistral", tokenizer)


@pytest.fixture
def make(model, tokenizer, tmp_path):
    """A trainer; keyword arguments replace the defaults, `config` those of ORPOConfig."""
    from oddsmith import ORPOConfig, ORPOTrainer
    from support.trainer_runs import arguments, pairs

    def make(kind=ORPOTrainer, config=None, **changed):
        given = {
            "model": model,
            "args": ORPOConfig(**arguments(tmp_path, **(config or {}))),
            "train_dataset": pairs(6),
            "processing_class": tokenizer,
        }
        return kind(**{**given, **changed})

    return make
