"""Rows of text on image-text models: the same metrics as TRL's trainer with their tokenizer."""

import os

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

pytest.importorskip("PIL", reason="the processors of image-text models need Pillow")

from oddsmith import ORPOConfig, ORPOTrainer
from support.image_models import image_model, image_pairs
from support.trainer_runs import arguments, train, train_logs

trl = pytest.importorskip("trl.experimental.orpo", reason="trl, the peer, is not installed")

# TRL's configuration sets the older name; another test checks that ours does not warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "mistral3"])
def test_metrics_and_weights(tmp_path, name):
    model, processor = image_model(name)
    rows = image_pairs(12, images=False)
    # TRL's trainer takes no processor, and its tokenizer has no template here.
    text = rows.map(lambda row: {side: row[side][0]["content"] for side in rows.column_names})
    args = arguments(tmp_path)
    ours = train(ORPOTrainer, ORPOConfig, model, processor, text, args)
    theirs = train(trl.ORPOTrainer, trl.ORPOConfig, model, processor.tokenizer, text, args)
    assert ours._packs()
    for mine, peer in zip(train_logs(ours), train_logs(theirs), strict=True):
        for key in ("loss", "nll_loss", "logps/chosen", "logps/rejected", "log_odds_ratio"):
            assert mine[key] == pytest.approx(peer[key], rel=1e-4), (name, key)
        assert mine["grad_norm"] == pytest.approx(peer["grad_norm"], rel=1e-3)
    weights = dict(theirs.model.named_parameters())
    for key, weight in ours.model.named_parameters():
        assert (weight - weights[key]).abs().max() < 2e-4, key
