"""How batches go through a model, and why."""

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from oddsmith.integrations.model_packing import RowLimits
from oddsmith.integrations.model_path import TrainingPath, path_of
from oddsmith.integrations.packed_trial import OWN_CODE, UNSEEN

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_what_it_says():
    path = TrainingPath()
    assert (path.batches, path.head, path.reasons) == ("packed", "fused", ())
    assert str(path) == (
        "Batches are packed without padding, and the loss is computed in the fused head."
    )
    limited = TrainingPath(limits=RowLimits(sequence=4096))
    assert str(limited) == (
        "Batches are packed without padding, and the loss is computed in the fused head, for "
        "sequences of up to 4,096 tokens; others keep their padding."
    )
    path = TrainingPath("it has a mask")
    assert (path.batches, path.head, path.reasons) == ("padded", "fused", ("it has a mask",))
    assert str(path) == "Batches keep their padding: it has a mask."
    # Logits are of padded batches, whatever else is known.
    path = TrainingPath(None, "it is odd")
    assert (path.batches, path.head, path.reasons) == ("padded", "plain", ("it is odd",))
    assert TrainingPath("it has a mask", "it is odd").reasons == ("it is odd",)
    assert str(path) == "The loss is computed from logits, not in the fused head: it is odd."


def test_of_models_without_weights():
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**SIZES))
        falcon = FalconForCausalLM(FalconConfig(**SIZES))
        experts = MixtralForCausalLM(MixtralConfig(**SIZES, output_router_logits=True))
        t5 = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, num_layers=1))
    assert path_of(llama) == TrainingPath()
    assert path_of(falcon).reasons == (f"{UNSEEN}: {OWN_CODE}",)
    assert path_of(experts) == TrainingPath()
    assert path_of(t5).reasons == ("it is an encoder-decoder model",)


def test_of_a_head_that_does_more():
    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 2.0
            return outputs

    (reason,) = path_of(Doubled(LlamaConfig(**SIZES))).reasons
    assert "more than the known softcap or scale" in reason


def test_a_model_without_weights_whose_body_cannot_be_replaced():
    config = Llama4TextConfig(
        **SIZES,
        num_local_experts=2,
        intermediate_size=48,
        intermediate_size_mlp=48,
        head_dim=12,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        core = Llama4ForCausalLM(config)
    found = path_of(core)
    assert found.head == "fused", found
    assert found == path_of(Llama4ForCausalLM(config))
