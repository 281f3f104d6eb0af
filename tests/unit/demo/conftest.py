"""What tests of the demo share."""

import pytest
import torch

from oddsmith.demo.model import build_model, train_tokenizer
from oddsmith.demo.tasks import make_pairs


@pytest.fixture(scope="package")
def rows():
    return make_pairs(240, seed=2)


@pytest.fixture(scope="package")
def tokenizer(rows):
    return train_tokenizer(
        message["content"]
        for row in rows
        for side in ("prompt", "chosen", "rejected")
        for message in row[side]
    )


@pytest.fixture(scope="package")
def model(tokenizer):
    torch.manual_seed(4)
    return build_model(tokenizer, hidden_size=32, num_hidden_layers=2).eval()
