"""The trainer's names for GaLore and APOLLO: options, targets, groups, refusals."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.training_args import OptimizerNames

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.optim.low_rank.apollo import APOLLOAdamW
from oddsmith.optim.low_rank.galore import GaLoreAdafactor, GaLoreAdamW
from oddsmith.optim.low_rank.galore_8bit import GaLoreAdamW8bit
from oddsmith.training.low_rank_names import LOW_RANK_NAMES, low_rank_optimizer, target_parameters
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

# PEFT reads a name that transformers 5.2x deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ARTICLE = [r".*attn.*", r".*mlp.*"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model("mistral", tokenizer)


@pytest.fixture
def config(tmp_path):
    def config(**changed):
        changed = {"optim_target_modules": ARTICLE, "optim_args": "rank=8", **changed}
        return ORPOConfig(**arguments(tmp_path, **changed))

    return config


def test_every_name_of_transformers_is_known():
    theirs = {each.value for each in OptimizerNames if each.value.startswith(("galore", "apollo"))}
    assert len(theirs) == 8
    assert theirs | {"galore_adamw_8bit_bnb"} == LOW_RANK_NAMES


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("galore_adamw", GaLoreAdamW),
        ("galore_adamw_8bit", GaLoreAdamW8bit),
        ("galore_adamw_8bit_bnb", GaLoreAdamW8bit),
        ("galore_adafactor", GaLoreAdafactor),
        ("galore_adamw_layerwise", GaLoreAdamW),
        ("galore_adamw_8bit_layerwise", GaLoreAdamW8bit),
        ("galore_adafactor_layerwise", GaLoreAdafactor),
        ("apollo_adamw", APOLLOAdamW),
        ("apollo_adamw_layerwise", APOLLOAdamW),
    ],
)
def test_arguments_reach_the_optimizer(name, kind, config, model):
    args = config(
        optim=name, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-4, weight_decay=0.03,
        learning_rate=2e-3, seed=13, max_grad_norm=0.7,
        optim_args="rank=8, update_proj_gap=50, scale=0.5",
    )  # fmt: skip
    found, kwargs = ORPOTrainer.get_optimizer_cls_and_kwargs(args, model)
    assert found is kind
    optimizer = found(**kwargs)
    assert optimizer.seed == 13 and optimizer.layerwise == name.endswith("layerwise")
    assert optimizer.max_grad_norm == (0.7 if optimizer.layerwise else None)
    *others, low = optimizer.param_groups
    assert (low["rank"], low["update_proj_gap"], low["scale"]) == (8, 50, 0.5)
    assert len(low["params"]) == 2 * 7 and low["weight_decay"] == 0.03
    assert all("rank" not in group and group["lr"] == 2e-3 for group in others)
    if kind is not GaLoreAdafactor:
        assert all(g["betas"] == (0.8, 0.95) and g["eps"] == 1e-4 for g in optimizer.param_groups)
    vectors = [g for g in others if any(p.dim() == 1 for p in g["params"])]
    assert [group["weight_decay"] for group in vectors] == [0.0]
    assert all(p.dim() == 1 for p in vectors[0]["params"])
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(model.parameters()))
    if kind is GaLoreAdamW8bit:
        (table,) = [group for group in others if group["optim_bits"] == 32]
        assert table["params"] == [model.get_input_embeddings().weight]
    optimizer.close()


def test_an_unknown_name_is_transformers(config, model):
    kind, kwargs = ORPOTrainer.get_optimizer_cls_and_kwargs(config(optim="adamw_torch"), model)
    assert kind is torch.optim.AdamW and kwargs["lr"] == 1e-3


def test_frozen_parameters_are_left_out(config, tokenizer):
    model = make_model("mistral", tokenizer)
    model.model.layers[0].requires_grad_(False)
    _, kwargs = low_rank_optimizer(config(optim="galore_adamw"), model)
    assert len(kwargs["params"][-1]["params"]) == 7
    assert all(p.requires_grad for group in kwargs["params"] for p in group["params"])


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", {"q", "k", "v", "o", "gate", "up", "down", "lm_head"}),
        ("all_linear", {"q", "k", "v", "o", "gate", "up", "down", "lm_head"}),
        (r".*\.q_proj", {"q"}),
        (["k_proj"], {"k"}),  # a part of the name
        (["model.layers.1.mlp.up_proj"], {"up"}),
        ([r".*attn\.[qo]_proj"], {"q", "o"}),
        (["attn", "mlp"], {"q", "k", "v", "o", "gate", "up", "down"}),
    ],
)
def test_targets(targets, names, model):
    found = target_parameters(model, targets, "galore_adamw")
    assert {name.split(".")[-2].removesuffix("_proj") for name in found} == names


def test_a_shared_head_goes_with_the_embeddings(tokenizer):
    tied = make_model("qwen3_tied", tokenizer)
    assert not [name for name in target_parameters(tied, "all-linear", "x") if "embed" in name]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (None, ValueError, "needs optim_target_modules"),
        (3, TypeError, "optim_target_modules is 3"),
        ("attention", ValueError, "'attention'; matches no linear layer"),
        (["norm"], ValueError, "matches no linear layer"),
        ("(", ValueError, "optim_target_modules is '\\('"),
    ],
)
def test_bad_targets(targets, error, message, model):
    with pytest.raises(error, match=message):
        target_parameters(model, targets, "galore_adamw")


def test_the_default_rank_on_a_narrow_model(config, model, caplog):
    # The article's rank of 128; the projections have 24 to 88 rows and columns.
    kind, kwargs = low_rank_optimizer(config(optim="galore_adamw", optim_args=None), model)
    optimizer = kind(kwargs["params"], lr=1e-3)
    (line,) = caplog.messages
    assert "rank is 128, more than a side of 14 of 14 matrices, such as (48, 48)" in line
    low = optimizer.param_groups[-1]["params"]
    for parameter in low:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    bases = [optimizer.state[parameter] for parameter in low]
    sides = [min(parameter.shape) for parameter in low]
    for state, side in zip(bases, sides, strict=True):
        basis = state["basis_left"].T if "basis_left" in state else state["basis_right"]
        assert len(basis) == side


def test_an_entry_that_matches_nothing_is_named(model, caplog):
    found = target_parameters(model, ["q_proj", "c_attn", r".*\.mlpp\..*"], "galore_adamw")
    assert len(found) == 2
    (line,) = caplog.messages
    assert line == (
        "optim_target_modules: 'c_attn', '.*\\\\.mlpp\\\\..*' match no linear layer of the model."
    )
    caplog.clear()
    target_parameters(model, ARTICLE, "galore_adamw")
    assert not caplog.messages


EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", EXPERTS),
        (ARTICLE, EXPERTS),
        (["mlp.experts"], EXPERTS),
        ([r".*\.experts"], EXPERTS),
        (r".*\.experts", EXPERTS),
        (["down_proj"], {"experts.down_proj"}),
        (r".*\.down_proj", {"experts.down_proj"}),
        (["q_proj"], set()),
    ],
)
def test_experts_are_targets(targets, names, tokenizer, caplog):
    experts = make_model("mixtral", tokenizer)
    found = target_parameters(experts, targets, "galore_adamw")
    assert {name.split("mlp.")[1] for name in found if "experts" in name} == names
    assert not [line for line in caplog.messages if "match no linear" in line]


@pytest.mark.parametrize(
    "name", ["galore_adamw_8bit", "galore_adafactor_layerwise", "apollo_adamw"]
)
def test_experts_are_trained(name, config, tokenizer, caplog):
    model = make_model("mixtral", tokenizer)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    args = config(optim=name, max_steps=2, learning_rate=1e-2, gradient_checkpointing=False)
    trainer = ORPOTrainer(model, args, train_dataset=pairs(4), processing_class=tokenizer)
    trainer.train()
    for key, each in model.named_parameters():
        if "experts" in key:
            assert [not torch.equal(a, b) for a, b in zip(each, before[key], strict=True)]
            assert len(trainer.optimizer.state[each]["slices"]) == len(each)
    assert not [line for line in caplog.messages if "full moments" in line]


def test_the_share_of_experts_is_said(config, tokenizer, caplog):
    experts, targets = make_model("mixtral", tokenizer), ["q_proj"]
    low_rank_optimizer(config(optim="galore_adamw", optim_target_modules=targets), experts)
    projected = sum(
        each.numel() for each in target_parameters(experts, targets, "galore_adamw").values()
    )
    share = 1 - projected / experts.num_parameters()
    (line,) = [each for each in caplog.messages if "full moments" in each]
    assert f": {share:.0%} of the trained parameters are updated with full moments" in line
    assert "experts.gate_up_proj (" in line


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"optim_target_modules": ["nothing"]}, ValueError, "matches no linear layer"),
        ({"optim": "apollo_adamw", "optim_args": "rank=8,svd=exact"}, ValueError, "unknown option"),
    ],
)  # fmt: skip
def test_bad_settings(changed, error, message, config, model):
    with pytest.raises(error, match=message):
        low_rank_optimizer(config(**{"optim": "galore_adamw", **changed}), model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_adapters_are_refused(config, tokenizer, tmp_path):
    model = make_model("mistral", tokenizer)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = config(optim="galore_adamw_8bit_bnb")
    with pytest.raises(ValueError, match="on a model with an adapter"):
        ORPOTrainer(
            model, args, train_dataset=pairs(4), processing_class=tokenizer, peft_config=lora
        )
    with pytest.raises(ValueError, match="on a model with an adapter"):
        low_rank_optimizer(args, get_peft_model(make_model("mistral", tokenizer), lora))


def test_all_frozen_is_refused(config, tokenizer):
    model = make_model("mistral", tokenizer)
    model.model.requires_grad_(False)
    with pytest.raises(ValueError, match="are frozen"):
        low_rank_optimizer(config(optim="galore_adamw"), model)


def test_sharded_models_and_many_processes_are_refused(config, model, monkeypatch):
    args = config(optim="galore_adamw_layerwise")
    monkeypatch.setattr(args, "fsdp", ["full_shard"])
    with pytest.raises(ValueError, match="with FSDP1: a projection needs full matrices"):
        low_rank_optimizer(args, model)
    monkeypatch.setattr(args, "fsdp", [])
    monkeypatch.setattr(args, "fp16", True)
    with pytest.raises(ValueError, match="with fp16"):
        low_rank_optimizer(args, model)

    class Sharded(nn.Parameter):
        device_mesh = "cpu"

    with pytest.raises(ValueError, match="is split over processes"):
        GaLoreAdamW([{"params": [Sharded(torch.zeros(9, 9))], "rank": 2}])
