"""The trainer's names for 8-bit and paged AdamW: arguments, groups, refusals."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.training_args import OptimizerNames

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from oddsmith.training.adamw_names import ADAMW_NAMES, adamw_optimizer, check_adamw_engine
from oddsmith.training.engine import Engine
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

# PEFT reads a name that transformers 5.2x deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

KINDS = {
    "adamw_8bit": AdamW8bit,
    "adamw_bnb_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW32bit,
    "paged_adamw_32bit": PagedAdamW32bit,
    "paged_adamw_8bit": PagedAdamW8bit,
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model("mistral", tokenizer)


@pytest.fixture
def config(tmp_path):
    return lambda **changed: ORPOConfig(**arguments(tmp_path, **changed))


def test_every_name_of_transformers_is_known():
    """By its member's name or its value: `paged_adamw` is only the former."""
    theirs = {name.lower(): each.value for name, each in OptimizerNames.__members__.items()}
    ours = {"adamw_8bit", "adamw_bnb", "paged_adamw", "paged_adamw_8bit"}
    assert {theirs[name] for name in ours} | {"paged_adamw"} == ADAMW_NAMES == set(KINDS)


@pytest.mark.parametrize("name", list(KINDS))
def test_arguments_reach_the_optimizer(name, config, model):
    args = config(
        optim=name, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-4, weight_decay=0.03,
        learning_rate=2e-3, seed=13,
    )  # fmt: skip
    kind, kwargs = ORPOTrainer.get_optimizer_cls_and_kwargs(args, model)
    assert kind is KINDS[name]
    optimizer = kind(**kwargs)
    assert type(optimizer) is kind and optimizer.seed == 13
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.95), 1e-4)
        assert group["weight_decay"] == (0.0 if group["params"][0].dim() == 1 else 0.03)
        assert group["stochastic_rounding"] is False and group["min_8bit_size"] == 4096
    found = [each for group in optimizer.param_groups for each in group["params"]]
    assert {id(each) for each in found} == {id(each) for each in model.parameters()}
    assert len(found) == len(list(model.parameters()))


@pytest.mark.parametrize("adapter", [False, True])
def test_groups_are_those_of_transformers(adapter, config, tokenizer):
    """Parameters have the same numbers as in a saved run with bitsandbytes, with empty groups."""
    lora = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    groups = {}
    for name in ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"):
        args = config(optim=name, weight_decay=0.03)
        trainer = ORPOTrainer(
            make_model("mistral", tokenizer), args, train_dataset=pairs(4),
            processing_class=tokenizer, peft_config=lora if adapter else None,
        )  # fmt: skip
        names = {id(each): name for name, each in trainer.model.named_parameters()}
        groups[name] = [
            ([names[id(each)] for each in group["params"]], group["weight_decay"])
            for group in trainer.create_optimizer().param_groups
        ]
    assert groups["paged_adamw_8bit"] == groups["paged_adamw_32bit"] == groups["adamw_torch"]
    assert [len(names) for names, _ in groups["adamw_torch"]] == ([4, 0] if adapter else [16, 5])


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_embeddings_have_32_bits(name, config, model):
    kind, kwargs = adamw_optimizer(config(optim=name, optim_args="min_8bit_size=1000"), model)
    optimizer = kind(**kwargs)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    model.zero_grad()
    for key, each in model.named_parameters():
        full = "embed_tokens" in key or each.numel() < 1000
        assert optimizer.state[each]["state1"].dtype == (torch.float32 if full else torch.uint8), (
            key
        )
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    table = optimizer.state[model.get_input_embeddings().weight]
    assert table["state1"].dtype == torch.float32


def test_optim_args(config, model, tmp_path):
    text = f"page_dir={tmp_path}, device_budget=1000000,stochastic_rounding=true,min_8bit_size=512"
    kind, kwargs = adamw_optimizer(config(optim="paged_adamw_8bit", optim_args=text), model)
    optimizer = kind(**kwargs)
    assert optimizer._pages.folder == tmp_path and optimizer._device_budget == 1_000_000
    for group in optimizer.param_groups:
        assert group["stochastic_rounding"] is True and group["min_8bit_size"] == 512
    text = "stochastic_rounding=False,min_8bit_size=8192"
    kind, kwargs = adamw_optimizer(config(optim="adamw_8bit", optim_args=text), model)
    groups = kind(**kwargs).param_groups
    assert {group["min_8bit_size"] for group in groups} == {8192}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "adamw_8bit",
            "page_dir=/tmp",
            "adamw_8bit: optim_args has the unknown option 'page_dir'",
        ),
        (
            "adamw_bnb_8bit",
            "betas=0.9",
            "the unknown option 'betas'; known are min_8bit_size, stoch",
        ),
        ("paged_adamw_8bit", "pages=3", "known are device_budget, min_8bit_size, page_dir, stoch"),
        (
            "paged_adamw",
            "device_budget=1e6",
            "device_budget is '1e6' in optim_args; must be an integ",
        ),
        (
            "adamw_8bit",
            "min_8bit_size=big",
            "min_8bit_size is 'big' in optim_args; must be an integ",
        ),
        (
            "adamw_8bit",
            "stochastic_rounding=2",
            "stochastic_rounding is '2' in .* must be true or fal",
        ),
        ("adamw_8bit", "min_8bit_size", "'min_8bit_size'; must be option=value"),
        ("adamw_8bit", "min_8bit_size=0", "min_8bit_size is 0; must be a positive integer"),
        ("paged_adamw_8bit", "device_budget=0", "device_budget is 0"),
        (
            "paged_adamw_32bit",
            "page_dir=/nowhere/at/all",
            "page_dir is '/nowhere/at/all'; must be a ",
        ),
    ],
)
def test_bad_optim_args(name, text, message, config, model):
    with pytest.raises(ValueError, match=message):
        kind, kwargs = adamw_optimizer(config(optim=name, optim_args=text), model)
        kind(**kwargs)


def test_fsdp1_is_refused(config, model, monkeypatch):
    args = config(optim="adamw_8bit")
    monkeypatch.setattr(args, "fsdp", ["full_shard"])
    for plugin in (None, {}, {"fsdp_version": 1}):
        monkeypatch.setattr(args, "fsdp_plugin_args", plugin, raising=False)
        with pytest.raises(ValueError, match="'adamw_8bit' with FSDP1, which joins parameters"):
            adamw_optimizer(args, model)
    monkeypatch.setattr(args, "fsdp_plugin_args", {"fsdp_version": 2}, raising=False)
    assert adamw_optimizer(args, model)[0] is AdamW8bit


@pytest.mark.parametrize(
    "engine, message",
    [
        (Engine(zero=2, optimizer=True), "'adamw_8bit', but DeepSpeed's configuration has an opti"),
        (Engine(zero=3, offload="nvme"), "'adamw_8bit', but DeepSpeed offloads .* to NVMe"),
        (Engine(zero=3, offload="cpu", offloaded=0.5), "'adamw_8bit', but DeepSpeed .* in part"),
    ],
)
def test_what_deepspeed_keeps_to_itself_is_refused(engine, message):
    with pytest.raises(ValueError, match=message):
        check_adamw_engine(engine, "adamw_8bit")


def test_offloading_to_the_cpu_is_not_refused():
    check_adamw_engine(Engine(zero=2, offload="cpu"), "adamw_8bit")


def test_deepspeed_joins_parameters_of_the_same_bits_only(config, model, monkeypatch):
    args = config(optim="adamw_8bit", optim_args="min_8bit_size=4000")
    alone = AdamW8bit(**adamw_optimizer(args, model)[1])
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}})
    monkeypatch.setattr(args, "deepspeed_plugin", plugin, raising=False)
    joined = AdamW8bit(**adamw_optimizer(args, model)[1])

    def bits(optimizer):
        return {
            each: (optimizer._bits(each, group), group["weight_decay"])
            for group in optimizer.param_groups
            for each in group["params"]
        }

    assert bits(joined) == bits(alone)
    assert {bits for bits, _ in bits(alone).values()} == {8, 32}
    for group in joined.param_groups:
        assert group["params"] and not group["full_precision"]
        assert len({joined._bits(each, group) for each in group["params"]}) == 1


def test_sizes_are_those_before_zero_3_has_split_them(config, tokenizer, monkeypatch):
    model = make_model("mistral", tokenizer)
    args = config(optim="adamw_8bit", optim_args="min_8bit_size=4000")
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    monkeypatch.setattr(args, "deepspeed_plugin", plugin, raising=False)
    expected = [len(group["params"]) for group in adamw_optimizer(args, model)[1]["params"]]
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    found = adamw_optimizer(args, model)[1]["params"]
    assert [len(group["params"]) for group in found] == expected


def test_the_version_of_fsdp_is_read_where_transformers_writes_it(config, model):
    """`fsdp_config={"version": 2}`, as the message of a refusal says."""
    args = config(optim="paged_adamw_8bit", fsdp="full_shard", fsdp_config={"version": 2})
    assert adamw_optimizer(args, model)[0] is PagedAdamW8bit
    args = config(optim="paged_adamw_8bit", fsdp="full_shard", fsdp_config={"version": 1})
    with pytest.raises(ValueError, match="with FSDP1"):
        adamw_optimizer(args, model)


def test_adapters_alone_are_trained(config, tokenizer):
    lora = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model("mistral", tokenizer), lora)
    kind, kwargs = adamw_optimizer(config(optim="paged_adamw_8bit"), model)
    optimizer = kind(**kwargs)
    found = [each for group in optimizer.param_groups for each in group["params"]]
    assert len(found) == 2 * 2 * 2 and all(each.requires_grad for each in found)


def test_a_model_is_needed(config):
    with pytest.raises(ValueError, match="optim is 'paged_adamw_32bit', which needs the model"):
        ORPOTrainer.get_optimizer_cls_and_kwargs(config(optim="paged_adamw"))


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None
from oddsmith import ORPOConfig, ORPOTrainer
from torch import nn
for name in {names}:
    args = ORPOConfig("out", optim=name, use_cpu=True, report_to="none")
    kind, kwargs = ORPOTrainer.get_optimizer_cls_and_kwargs(args, nn.Linear(3, 4))
    print(kind(**kwargs).__class__.__name__)
"""


def test_bitsandbytes_need_not_be_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=list(KINDS))],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [kind.__name__ for kind in KINDS.values()]


def test_an_unknown_name_is_transformers(config, model):
    kind, kwargs = ORPOTrainer.get_optimizer_cls_and_kwargs(config(optim="adamw_torch"), model)
    assert kind is torch.optim.AdamW and kwargs["lr"] == 1e-3
