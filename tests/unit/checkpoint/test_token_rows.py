"""Rows of embeddings that an adapter replaces; merged as by peft in test_merge.py."""

import pytest
import torch
from safetensors.torch import load_file

from oddsmith.checkpoint.adapter import Adapter
from oddsmith.checkpoint.folder import Checkpoint
from oddsmith.checkpoint.merge import merge_adapter
from oddsmith.checkpoint.token_rows import rows_name, write_with_rows
from oddsmith.errors import UserError
from support.checkpoint_models import make_adapter, weights

EMBEDDING = "model.embed_tokens"
NAME = f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta"


def test_only_these_rows_are_replaced(base, tmp_path):
    rows = torch.tensor([[2.0], [3.0]]).expand(2, 48).contiguous()
    folder = make_adapter(tmp_path, {NAME: rows}, trainable_token_indices=[7, 4])
    adapter, before = Adapter(folder), weights(base)[f"{EMBEDDING}.weight"]
    keys = {EMBEDDING: f"{EMBEDDING}.weight"}
    (tmp_path / "rows").mkdir()
    found = load_file(write_with_rows(Checkpoint(base), adapter, keys, tmp_path / "rows"))
    assert found.keys() == {rows_name(EMBEDDING)}
    whole = found[rows_name(EMBEDDING)]
    expected = before.float().clone()
    expected[7], expected[4] = 2.0, 3.0
    assert whole.dtype == torch.float32 and torch.equal(whole, expected)


@pytest.mark.parametrize(
    ("rows", "indices", "words"),
    [
        ((2, 48), [1], r"has shape \(2, 48\) for the tokens \[1\]"),
        ((1, 40), [1], r"has shape \(1, 40\)"),
        ((1, 48), [4000], r"for the tokens \[4000\]"),
        ((1, 48), {"other": [1]}, "has trained rows but no trainable_token_indices"),
    ],
)
def test_rows_of_tokens_that_do_not_fit(rows, indices, words, base, tmp_path):
    adapter = make_adapter(tmp_path, {NAME: torch.ones(rows)}, trainable_token_indices=indices)
    with pytest.raises(UserError, match=words):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
