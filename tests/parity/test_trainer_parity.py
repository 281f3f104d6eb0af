"""ORPOTrainer gives the same results as TRL 1.16's: all metrics of all steps, and the final
weights.

The same model, rows, seed and order, in float32. Both trainers run here, side by side.
"""

import gzip
import json
import os

import pytest
import torch
from datasets import Dataset

from support.paths import SHARED
from support.releases import release

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from oddsmith import ORPOConfig, ORPOTrainer
from support.trainer_runs import (
    MODELS,
    arguments,
    long_pairs,
    make_model,
    make_tokenizer,
    pairs,
    train,
    train_logs,
)

trl = pytest.importorskip("trl.experimental.orpo", reason="trl, the peer, is not installed")

pytestmark = [
    # TRL's configuration sets the older name; another test checks that ours does not warn.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT reads a deprecated name of transformers.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


# Its releases for Python 3.10 do these otherwise.
since_1_16 = pytest.mark.skipif(
    release("trl") < (1, 16), reason="TRL before 1.16 cuts long rows and draws adapters otherwise"
)

ALPACA = SHARED / "data" / "alpacaeval_mistral_orpo.jsonl.gz"

RELATIVE = 1e-4
# Differences are as exact as the larger numbers that they come from.
DIFFERENCES = {
    "rewards/margins": "rewards/chosen",
    "log_odds_chosen": "logps/chosen",
    "log_odds_ratio": "logps/chosen",
}
SPEED = ("runtime", "per_second", "total_flos")


def both(model, tokenizer, rows, args, **kwargs):
    """The same run with both trainers: ours, TRL's."""
    ours = train(ORPOTrainer, ORPOConfig, model, tokenizer, rows, args, **kwargs)
    theirs = train(trl.ORPOTrainer, trl.ORPOConfig, model, tokenizer, rows, args, **kwargs)
    return ours, theirs


def assert_same_metrics(ours, theirs, *, padded):
    """Every logged metric; TRL's logits/* include padding, ours do not."""
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for mine, peer in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        # TRL adds the auxiliary loss to the loss, and does not log it.
        assert set(mine) - {"aux_loss", "eval_aux_loss"} == set(peer)
        for name, value in peer.items():
            if any(part in name for part in SPEED) or (padded and "logits/" in name):
                continue
            bare, prefix = (
                name.removeprefix("eval_"),
                name[: len(name) - len(name.removeprefix("eval_"))],
            )
            scale = abs(value)
            if bare in DIFFERENCES:
                scale = max(scale, abs(peer[prefix + DIFFERENCES[bare]]))
            if bare.startswith("logits/"):
                scale = max(scale, 0.1)  # a mean of logits of both signs
            assert mine[name] == pytest.approx(value, rel=0, abs=RELATIVE * scale), (
                f"step {peer['step']}: {name}"
            )


def assert_same_weights(ours, theirs):
    peers = dict(theirs.model.named_parameters())
    assert set(peers) == {name for name, _ in ours.model.named_parameters()}
    for name, mine in ours.model.named_parameters():
        assert mine.requires_grad == peers[name].requires_grad, name
        error = (mine - peers[name]).abs().max().item()
        assert error <= 1e-4, f"{name} is {error:.2e} off"


def moved(trainer, model):
    """How far the weights moved: a comparison of unchanged weights would prove nothing."""
    before = dict(model.named_parameters())
    return max(
        (weight - before[name]).abs().max().item()
        for name, weight in trainer.model.named_parameters()
        if name in before
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_every_family(name, tmp_path):
    tokenizer = make_tokenizer(name)
    model = make_model(name, tokenizer)
    extra = {"max_completion_length": 20} if name == "t5" else {}
    # A gradient that is zero up to rounding, as that of a bias of keys, Adam would amplify to full steps.
    args = arguments(tmp_path, adam_epsilon=1e-6, **extra)
    ours, theirs = both(model, tokenizer, pairs(24), args)
    assert (ours._plain_because is None) == (name != "t5")
    assert_same_metrics(ours, theirs, padded=True)
    assert_same_weights(ours, theirs)
    assert moved(ours, model) > 5e-4


@since_1_16
@pytest.mark.parametrize("name", ["mistral", "mixtral", "gemma2_softcap", "granite_scale"])
def test_mean_logits_without_padding(name, tmp_path):
    tokenizer = make_tokenizer(name)
    args = arguments(tmp_path, max_length=24, gradient_checkpointing=False)
    ours, theirs = both(make_model(name, tokenizer), tokenizer, long_pairs(16), args)
    lengths = {len(row["chosen_input_ids"]) for row in ours.train_dataset}
    assert lengths == {24}
    assert_same_metrics(ours, theirs, padded=False)


@since_1_16
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "kept"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_mistral_with_evaluation(lora, checkpointing, tmp_path):
    from peft import LoraConfig

    tokenizer = make_tokenizer()
    model = make_model("mistral", tokenizer)
    args = arguments(
        tmp_path,
        max_steps=10,
        gradient_checkpointing=checkpointing,
        eval_strategy="steps",
        eval_steps=5,
        per_device_eval_batch_size=7,  # TRL averages over batches, of which each has its token mean
        max_grad_norm=0.4,  # clips
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
    )
    adapter = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.2, "task_type": "CAUSAL_LM"}
    peft_config = LoraConfig(target_modules=["q_proj", "down_proj"], **adapter) if lora else None
    kwargs = {"eval_dataset": pairs(7, seed=9), "peft_config": peft_config}
    ours, theirs = both(model, tokenizer, pairs(30), args, **kwargs)
    assert ours._plain_because is None
    assert_same_metrics(ours, theirs, padded=True)
    assert_same_weights(ours, theirs)


@since_1_16
def test_lora_with_a_trained_head(tmp_path):
    from peft import LoraConfig

    tokenizer = make_tokenizer()
    peft_config = LoraConfig(
        r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    args = arguments(tmp_path, max_steps=4)
    model = make_model("mistral", tokenizer)
    ours, theirs = both(model, tokenizer, pairs(20), args, peft_config=peft_config)
    assert ours._plain_because is None
    assert_same_metrics(ours, theirs, padded=True)
    assert_same_weights(ours, theirs)
    head = ours.model.get_base_model().lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_through_logits(tmp_path):
    """The plain path has the same numbers."""
    tokenizer = make_tokenizer()
    model = make_model("mistral", tokenizer)
    args = arguments(tmp_path)
    config = ORPOConfig(**args, use_fused_head=False)
    ours = train(ORPOTrainer, lambda: config, model, tokenizer, pairs(24), {})
    theirs = train(trl.ORPOTrainer, trl.ORPOConfig, model, tokenizer, pairs(24), args)
    assert ours._plain_because == "use_fused_head is False"
    assert_same_metrics(ours, theirs, padded=True)
    assert_same_weights(ours, theirs)


def alpaca_rows(count):
    with gzip.open(ALPACA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count))]
    return Dataset.from_list(
        [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "kept"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_issue_sized(lora, checkpointing, tmp_path):
    """Mistral's shape and tokenizer on real pairs; `max_length` 256 to keep it to minutes."""
    if not ALPACA.exists():
        pytest.skip(f"{ALPACA} is not there; set ODDSMITH_SHARED to the folder that holds data/")
    pytest.importorskip("mistral_common", reason="brings the tokenizer of Mistral-7B")
    from peft import LoraConfig
    from transformers import MistralConfig, MistralForCausalLM

    from support.tokenizer_zoo import mistral

    tokenizer = mistral(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(1)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1792,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )
    args = arguments(
        tmp_path,
        max_steps=20,
        max_length=256,
        learning_rate=3e-4,
        gradient_checkpointing=checkpointing,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
    peft_config = LoraConfig(target_modules=targets, **adapter) if lora else None
    ours, theirs = both(model, tokenizer, alpaca_rows(100), args, peft_config=peft_config)
    assert ours._plain_because is None
    assert len(train_logs(ours)) == 20
    assert_same_metrics(ours, theirs, padded=True)
    assert_same_weights(ours, theirs)
