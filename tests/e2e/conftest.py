"""A model and data small enough to test the command line in seconds."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from oddsmith.demo.model import build_model, train_tokenizer
from oddsmith.demo.tasks import make_pairs
from support.engine_launch import Alone
from support.engine_runs import save_models
from support.ultrafeedback import ultrafeedback_rows


@pytest.fixture(scope="session")
def ultrafeedback(tmp_path_factory) -> Path:
    """Folder of a saved DatasetDict with UltraFeedback's splits and columns."""
    folder = tmp_path_factory.mktemp("ultrafeedback")
    train, test = ultrafeedback_rows(24, seed=1), ultrafeedback_rows(6, seed=2)
    supervised = [{"prompt": row["prompt"], "messages": row["messages"]} for row in train]
    DatasetDict(
        train_prefs=Dataset.from_list(train),
        test_prefs=Dataset.from_list(test),
        train_sft=Dataset.from_list(supervised),
    ).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory) -> Path:
    """Folder of a base model in Mistral's shape: no chat template, no pad token."""
    folder = tmp_path_factory.mktemp("tiny-mistral")
    texts = [
        message["content"]
        for row in make_pairs(240, seed=3)
        for side in ("prompt", "chosen")
        for message in row[side]
    ]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(5)
    build_model(tokenizer, hidden_size=32, num_hidden_layers=2).save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine_models(tmp_path_factory) -> Path:
    """Folder of the models that two processes and one train."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="session")
def alone(engine_models, tmp_path_factory) -> Alone:
    """What one process gives for a cell of engines and features."""
    return Alone(engine_models, lambda: tmp_path_factory.mktemp("one"))


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    """Keeps what datasets caches of a test's files out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
