"""Adapters that tensor parallelism trains, and those that are refused."""

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training.split_adapters import check_adapter_kind, check_adapter_layers
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj"], "lora_dropout": 0.1, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"},
    ],
)
def test_plain_lora_is_trained(options):
    check_adapter_kind(LoraConfig(**options))


def test_lora_that_was_loaded_is_trained(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    check_adapter_kind(LoraConfig.from_pretrained(tmp_path))


# What peft 0.21 does: mixed tensors in the first forward pass, a deadlock, a part of a gradient.
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"trainable_token_indices": [3]},
        {"bias": "all"},
    ],
)
def test_an_option_is_refused_by_its_name(options):
    with pytest.raises(
        ValueError, match=f"trains LoRA alone, and the adapter has {next(iter(options))}="
    ):
        check_adapter_kind(LoraConfig(**options))


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="trains LoRA alone, and the adapter is IA3: use a plain"):
        check_adapter_kind(IA3Config())


def test_it_is_refused_before_the_adapter_is_made(tmp_path, monkeypatch):
    """peft waits without end for the other processes where it takes a split weight apart."""
    model = make_model("mistral", make_tokenizer())
    monkeypatch.setattr(type(model), "tp_size", 2)
    monkeypatch.setattr("peft.get_peft_model", lambda *args, **kwargs: pytest.fail("it was made"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        ORPOTrainer(
            model,
            ORPOConfig(**arguments(tmp_path)),
            train_dataset=pairs(4),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(init_lora_weights="pissa", task_type="CAUSAL_LM"),
        )


def test_the_adapter_of_a_given_model_is_looked_at():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(make_model("mistral", make_tokenizer()), config)
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]"):
        check_adapter_layers(model)


@pytest.mark.parametrize(
    "name, place, refused",
    [
        ("q_proj", Shard(0), False),
        ("o_proj", Shard(1), True),
        ("lm_head", Shard(0), True),
        ("router", Replicate(), False),
    ],
)
def test_adapters_on_split_layers(name, place, refused):
    """peft 0.21 has wrong shapes in the middle of a step."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        layer = nn.Linear(4, 4, bias=False)
        layer.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [place]))
        model = nn.ModuleDict({name: nn.ModuleDict({"base_layer": layer})})
        if not refused:
            check_adapter_layers(model)
            return
        with pytest.raises(ValueError, match=f"splits the columns of {name}, or its logits"):
            check_adapter_layers(model)
    finally:
        dist.destroy_process_group()
