"""The model of a run: loaded by name, its adapter, what is refused."""

import pytest
import torch
from transformers import LlamaForSequenceClassification, LlamaModel

from oddsmith import ORPOConfig
from oddsmith.training.models import check_trainable, load_model, vocabulary_size
from support.packed_models import tiny
from support.trainer_runs import arguments, make_model, make_tokenizer

# PEFT reads a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def test_model_without_a_head(make, model):
    for kind in (LlamaModel, LlamaForSequenceClassification):
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=900, hidden_size=8, intermediate_size=8, num_attention_heads=2
        )
        config.num_hidden_layers, config.pad_token_id = 1, 0
        with pytest.raises(ValueError, match=f"{kind.__name__}, which has no output head"):
            make(model=kind(config))


def test_labels_outside_the_vocabulary(make, model):
    model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="token id .*the model's vocabulary has 300"):
        make()


def test_peft_model_with_a_peft_config(make, model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    with pytest.raises(ValueError, match="merge_and_unload"):
        make(model=wrapped, peft_config=config)
    assert make(model=wrapped)._plain_because is None


def test_model_init_kwargs_with_a_model(make):
    with pytest.raises(ValueError, match="model is not a name"):
        make(config={"model_init_kwargs": {"dtype": "float32"}})


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_model_by_name(make, model, tokenizer, tmp_path, name):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make(
        model=str(tmp_path / "base"),
        processing_class=None,
        config={"model_init_kwargs": {name: "bfloat16"}},
    )
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.vocab_size == tokenizer.vocab_size
    assert getattr(trainer.model, "hf_device_map", None) is None


def test_unknown_dtype(tmp_path, model):
    model.save_pretrained(tmp_path / "base")
    config = ORPOConfig(**arguments(tmp_path), model_init_kwargs={"dtype": "float33"})
    with pytest.raises(ValueError, match="'float33'; must be 'auto' or a torch dtype"):
        load_model(str(tmp_path / "base"), config)


def test_encoder_decoder_by_name(make, tmp_path):
    tokenizer = make_tokenizer("t5")
    make_model("t5", tokenizer).save_pretrained(tmp_path / "base")
    trainer = make(model=str(tmp_path / "base"), processing_class=tokenizer)
    assert trainer.is_encoder_decoder and trainer.max_completion_length == 128
    assert trainer._plain_because == "it is an encoder-decoder model"


def test_gradients_reach_an_adapter_under_checkpointing(make):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    # Reentrant checkpointing gives no gradient if no input of a layer requires one.
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    trainer = make(peft_config=config, config=checkpointing)
    trainer.train()
    moved = [p.abs().max() for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert moved and min(moved) > 0


def test_a_model_with_nothing_to_train():
    layer = torch.nn.Linear(2, 2)
    check_trainable(layer)
    with pytest.raises(ValueError, match="no parameter of the Linear is trainable; set requires"):
        check_trainable(layer.requires_grad_(False))


def test_the_vocabulary_of_a_tied_head_that_is_trained_whole(make, tokenizer):
    from peft import LoraConfig

    # peft makes the layer that it trains with the two sizes of the head exchanged.
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens"], ensure_weight_tying=True,
    )  # fmt: skip
    tied = make_model("qwen3_tied", tokenizer)
    trainer = make(model=tied, peft_config=config)
    assert vocabulary_size(trainer.model) == tied.config.vocab_size
    assert not trainer.path.reasons
    trainer.train()
    core = trainer.model.get_base_model()
    ends = (core.get_input_embeddings(), core.get_output_embeddings())
    weights = [end.modules_to_save["default"].weight for end in ends]
    assert weights[0] is weights[1]
    assert not torch.equal(weights[0], ends[0].original_module.weight)


@pytest.mark.filterwarnings("ignore")  # of peft
def test_unilora_on_quantised_layers_is_refused(make, model, tmp_path):
    from peft import UniLoraConfig

    from oddsmith.integrations.nf4_config import NF4Config

    config = UniLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", theta_d_length=64)
    model.save_pretrained(tmp_path / "base")
    quantised = type(model).from_pretrained(
        tmp_path / "base", quantization_config=NF4Config(compute_dtype="float32")
    )
    with pytest.raises(ValueError, match="UniLoRA on quantised layers: .*torch.uint8.*are zero"):
        make(model=quantised, peft_config=config)
    trainer = make(model=model, peft_config=config)
    trainer.train()
    assert max(entry.get("grad_norm", 0.0) for entry in trainer.state.log_history) > 0


def test_an_adapter_on_a_router(make, tokenizer):
    from peft import LoraConfig, get_peft_model

    sizes = {"vocab_size": len(tokenizer)}
    all_linear = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(model=tiny("Llama4Text", **sizes), peft_config=all_linear)
    trainer.train()
    assert trainer.state.global_step > 0
    wrapped = get_peft_model(tiny("Llama4Text", **sizes), all_linear)
    with pytest.raises(ValueError, match=r"add exclude_modules=\['router'\]"):
        make(model=wrapped)
