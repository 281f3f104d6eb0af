"""Small models and data that take the place of those that README and docs name."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from oddsmith.demo.model import build_model, train_tokenizer
from oddsmith.demo.tasks import make_pairs
from support.image_models import image_model
from support.ultrafeedback import ultrafeedback_rows


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


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Folder of a small image-text model and its processor."""
    folder = tmp_path_factory.mktemp("image")
    model, processor = image_model("gemma3")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stand_ins(pairs_folder, instruct_folder, image_folder) -> dict[str, str]:
    """Local folders for the hub ids that the pages name."""
    return {
        "google/gemma-3-4b-it": str(image_folder),
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(instruct_folder),
        "HuggingFaceH4/ultrafeedback_binarized": str(pairs_folder),
    }


@pytest.fixture
def localized(stand_ins):
    """Replaces the hub ids of a text."""

    def replace(text: str) -> str:
        for hub_id, folder in stand_ins.items():
            text = text.replace(hub_id, folder)
        return text

    return replace


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    """Keeps what datasets caches out of the user's cache, here and in processes that a test starts."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
