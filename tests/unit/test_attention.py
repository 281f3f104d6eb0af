"""Packed rows: the same hidden states and gradients as a padded batch, model by model."""

import pytest
import torch
import transformers

from oddsmith import attention

LENGTHS = (9, 1, 6, 13)

MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mistral-window": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Gemma": {"head_dim": 8},
    "Phi3": {"pad_token_id": 0},
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
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
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
    """Gemma's and Cohere's norms compute in float32 whatever the model's dtype."""
    return {"Mixtral": 1e-5, "Gemma": 1e-6, "Cohere": 1e-6}.get(name, 1e-9)


def gemma2():
    """With softcapped attention, which its own classes only run eagerly."""
    model = tiny_model("Gemma2", "eager", head_dim=8)
    model.config._attn_implementation = "sdpa"
    return model


def padded_batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (len(LENGTHS), max(LENGTHS)))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~real, 0), real


# Names that transformers 5.17 has; 5.23 prefers newer ones.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_packed_equals_padded(name, checkpointing):
    model = tiny_model(name)
    ids, real = padded_batch()
    weights = torch.randn(int(real.sum()), 61, dtype=model.dtype)
    close = {"rtol": tolerance(name), "atol": tolerance(name)}
    embeddings = model.get_input_embeddings()

    def run(packed):
        model.zero_grad()
        if packed:
            inputs = attention.packed_inputs(ids, real, LENGTHS)
        else:
            inputs = {"input_ids": ids, "attention_mask": real.long()}
        inputs["inputs_embeds"] = embeddings(inputs.pop("input_ids")).detach().requires_grad_()
        logits = model(**inputs, use_cache=False).logits
        logits = logits[0] if packed else logits[real]
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    truth, true_grads = run(packed=False)
    attention.install(model)
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    logits, grads = run(packed=True)
    torch.testing.assert_close(logits, truth, **close)
    torch.testing.assert_close(grads, true_grads, **close)
    # Calls that name no sequences still go through the padding mask.
    torch.testing.assert_close(run(packed=False)[0], truth, **close)


def test_generation_and_saving_are_left_alone(tmp_path):
    model = tiny_model("Llama").float()
    prompt = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    truth = model.generate(prompt, **options)
    attention.install(model)
    assert torch.equal(model.generate(prompt, **options), truth)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny_model("Llama", "eager"), "its attention is 'eager', not 'sdpa'"),
        (gemma2, "its attention has a softcap"),
        (
            lambda: tiny_model("Falcon", "sdpa", alibi=True, new_decoder_architecture=False),
            "could not be tried out|other results",
        ),
    ],
)
def test_models_that_cannot_are_left_as_they_were(make, reason):
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(attention.CannotPack, match=reason):
        attention.install(model)
    assert model.config._attn_implementation == before
    assert model.training


def test_modes_of_frozen_parts_survive():
    model = tiny_model("Llama")
    model.model.layers[0].eval()
    attention.install(model)
    assert model.training and not model.model.layers[0].training
