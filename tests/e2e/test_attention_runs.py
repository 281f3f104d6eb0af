"""Training runs on packed rows with each kind of attention, and with the auxiliary loss of experts:
the same losses and weights as with padding.
"""

import pytest
import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import oddsmith
from oddsmith import ORPOConfig, ORPOTrainer
from support import flash_stand_in
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs, train, train_logs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def both(model, out, **changes):
    """Runs with packed rows and with padding."""
    adapter = changes.pop("peft_config", None)
    runs = []
    for padding_free in (True, False):
        args = arguments(out, padding_free=padding_free, share_prompt=True, **changes)
        dataset = pairs(12)
        given = {"peft_config": adapter} if adapter is not None else {}
        run = train(ORPOTrainer, ORPOConfig, model, make_tokenizer(), dataset, args, **given)
        assert run.path.batches == ("packed" if padding_free else "padded"), str(run.path)
        runs.append(run)
    return runs


def assert_same_runs(packed, padded, tolerance=1e-4):
    for mine, theirs in zip(train_logs(packed), train_logs(padded), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "nll_loss", "rewards/margins", *_AUX & mine.keys()):
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name
    for (name, a), (_, b) in zip(
        packed.model.named_parameters(), padded.model.named_parameters(), strict=True
    ):
        if a.requires_grad:
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=name)


_AUX = {"aux_loss"}
LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_auxiliary_loss_of_a_packed_row_is_that_of_a_padded_batch(lora, tmp_path):
    model = make_model("mixtral", make_tokenizer())
    adapter = LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None
    packed, padded = both(model, tmp_path, peft_config=adapter, eval_strategy="no")
    assert_same_runs(packed, padded)
    (first, *_) = train_logs(packed)
    assert first["aux_loss"] > 0.5
    assert first["loss"] != pytest.approx(first["nll_loss"], rel=1e-3)


def gpt_oss(tokenizer):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        output_router_logits=True,
        router_aux_loss_coef=0.05,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
        attn_implementation="eager",
    )
    return GptOssForCausalLM(config)


def gemma2(tokenizer):
    return make_model("gemma2_softcap", tokenizer)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("make", [gpt_oss, gemma2])
def test_softcap_sinks_and_windows_train_alike(make, checkpointing, tmp_path):
    model = make(make_tokenizer())
    assert_same_runs(*both(model, tmp_path, gradient_checkpointing=checkpointing))


@pytest.fixture
def four_bits():
    yield
    oddsmith.use_for_bitsandbytes(False)


def test_qlora_with_flash_attention_packs(four_bits, tmp_path, monkeypatch):
    """As on a GPU: 4-bit layers that compute in bfloat16, flash_attention_2, an adapter."""
    make_model("mistral", make_tokenizer()).save_pretrained(tmp_path / "model")
    calls = flash_stand_in.install(monkeypatch)
    runs = []
    for padding_free in (True, False):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model",
            quantization_config=oddsmith.NF4Config(bnb_4bit_compute_dtype=torch.bfloat16),
            dtype=torch.bfloat16,
        )
        model.config._attn_implementation = "flash_attention_2"
        model = prepare_model_for_kbit_training(model)
        del calls[:]
        torch.manual_seed(5)
        trainer = ORPOTrainer(
            model=model,
            args=ORPOConfig(
                **arguments(tmp_path / "out", padding_free=padding_free, bf16=True),
                activation_budget="none",
            ),
            train_dataset=pairs(12),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        )
        trainer.train()
        assert trainer.path.batches == ("packed" if padding_free else "padded"), str(trainer.path)
        # Our call of the kernel, in each layer of each forward pass and of its repetition.
        steps = 3 * 2 * 2 * model.config.num_hidden_layers
        assert len(calls) == (steps if padding_free else 0)
        runs.append(trainer)
    for mine, theirs in zip(*map(train_logs, runs), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
