"""Small models and data that take the place of those that README and docs name."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from oddsmith.demo.model import build_model, train_tokenizer
from oddsmith.demo.tasks import make_pairs


def ultrafeedback_rows(count: int, seed: int) -> list[dict]:
    """Rows in the shape of ultrafeedback_binarized: a bare prompt beside whole conversations."""
    return [
        {
            "prompt": row["prompt"][0]["content"],
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
        }
        for row in make_pairs(count, seed)
    ]


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    """Folder that `load_dataset` takes, with UltraFeedback's splits."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "data").mkdir()
    for split, count, seed in (("train_prefs", 48, 8), ("test_prefs", 16, 9)):
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(ultrafeedback_rows(count, seed)).to_parquet(file)
    return folder


@pytest.fixture(scope="session")
def instruct_folder(tmp_path_factory) -> Path:
    """Folder of a small instruct model: with a chat template and a padding token."""
    folder = tmp_path_factory.mktemp("instruct")
    texts = [
        message["content"]
        for row in make_pairs(240, seed=3)
        for side in ("prompt", "chosen")
        for message in row[side]
    ]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(5)
    build_model(tokenizer, hidden_size=64, num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    """Keeps what datasets caches out of the user's cache, here and in processes that a test starts."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
