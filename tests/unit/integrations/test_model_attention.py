"""Packed rows: the same logits and gradients as a padded batch, model by model."""

from contextlib import ExitStack

import pytest
import torch
import transformers

from oddsmith.integrations import model_attention, model_packing
from oddsmith.packing.batch import PackedBatch
from support.double import stay_in_double
from support.packed_models import SIZES, padded, pairs_of

MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mistral-window": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Gemma": {"head_dim": 8},
    "Phi3": {},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4},
    "Cohere": {},
    "Granite": {},
}
# Checkpointing is the same code in every model.
CASES = [(name, None) for name in MODELS] + [
    (name, {"use_reentrant": reentrant})
    for name in ("Llama", "Mistral-window")
    for reentrant in (False, True)
]


def tiny_model(name, attn_implementation="sdpa", **changes):
    family = name.split("-")[0]
    options = {
        **SIZES,
        "attn_implementation": attn_implementation,
        **MODELS.get(name, {}),
        **changes,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    # The experts' grouped product knows no float64.
    return model if family == "Mixtral" else model.double()


def tolerance(name):
    return 1e-5 if name == "Mixtral" else 1e-9


@pytest.fixture
def double():
    with ExitStack() as stack:
        yield stack


# Names that transformers 5.17 has; 5.23 prefers newer ones.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_packed_equals_padded(name, checkpointing, share, double):
    model = tiny_model(name)
    model_packing.check(model)  # by a small model in float32
    if model.dtype == torch.float64:
        double.enter_context(stay_in_double())
    pairs = pairs_of(prompts="differ" if name == "Qwen2" else "same")
    ids, mask, rows = padded(pairs)
    batch = PackedBatch.build(pairs, share)
    assert share == (batch.input_ids.numel() < mask.sum())
    weights = torch.randn(len(rows), 61, dtype=model.dtype)
    close = {"rtol": tolerance(name), "atol": tolerance(name)}

    def run(packed):
        model.zero_grad()
        if packed:
            inputs, where = model_attention.packed_inputs(batch), batch.rows
        else:
            inputs, where = {"input_ids": ids, "attention_mask": mask}, rows
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[where]
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    truth, true_grads = run(packed=False)
    if checkpointing is not None:
        model.train()
        if checkpointing["use_reentrant"]:  # as Trainer does for adapters
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    logits, grads = run(packed=True)
    torch.testing.assert_close(logits, truth, **close)
    torch.testing.assert_close(grads, true_grads, **close)
    # Calls that name no segments still go through the padding mask.
    torch.testing.assert_close(run(packed=False)[0], truth, **close)


def test_generation_and_saving_are_left_alone(tmp_path):
    model = tiny_model("Llama").float()
    prompt = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    truth = model.generate(prompt, **options)
    model_packing.check(model)
    assert torch.equal(model.generate(prompt, **options), truth)
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: tiny_model("Falcon", "sdpa", alibi=True, new_decoder_architecture=False),
            "does not get the packed row",
        ),
    ],
)
def test_models_that_cannot_are_left_as_they_were(make, reason):
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(model_attention.CannotPack, match=reason):
        model_packing.check(model)
    assert model.config._attn_implementation == before
    assert model.training


def test_modes_of_frozen_parts_survive():
    model = tiny_model("Llama")
    model.model.layers[0].eval()
    model_packing.check(model)
    assert model.training and not model.model.layers[0].training
