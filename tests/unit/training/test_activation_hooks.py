"""Runs that keep activations: they are equal to those that recompute them, to the bit."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from oddsmith import NF4Config, ORPOConfig, ORPOTrainer
from support.models import checkpointed
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

LORA = LoraConfig(
    r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
)


class Watched(ORPOTrainer):
    """Notes how many layers each micro-batch keeps."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        activations = self._activations
        self.counts = [*getattr(self, "counts", []), activations and activations[1].kept_layers]
        return loss


def trainer_for(
    tmp_path, budget, name="mistral", model=None, kind=Watched, adapter=None, **changed
):
    settings = {"gradient_checkpointing": True, "max_steps": 3, "save_strategy": "no", **changed}
    return kind(
        make_model(name, make_tokenizer(name)) if model is None else model,
        ORPOConfig(**arguments(tmp_path, activation_budget=budget, **settings)),
        train_dataset=pairs(12),
        processing_class=make_tokenizer(name),
        peft_config=copy.deepcopy(adapter),
    )


def run(*args, **kwargs):
    trainer = trainer_for(*args, **kwargs)
    trainer.train()
    return trainer


def assert_equal(trainer, other):
    for name, value in other.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    kept = [
        {k: v for k, v in log.items() if not k.startswith("train_")}
        for log in other.state.log_history
    ]
    assert [
        {k: v for k, v in log.items() if not k.startswith("train_")}
        for log in trainer.state.log_history
    ] == kept


RUNS = {
    "full": {},
    "lora": {"adapter": LORA},
    "reentrant lora": {
        "adapter": LORA,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "disable_dropout": False,
    },
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "padded": {"padding_free": False, "disable_dropout": False},
    "logits": {"use_fused_head": False},
    "bfloat16": {"bf16": True},
    "padded bfloat16 lora": {"bf16": True, "padding_free": False, "adapter": LORA},
    "encoder-decoder": {"name": "t5"},
    "layer by layer": {
        "optim": "galore_adamw_layerwise",
        "optim_target_modules": ["q_proj"],
        "gradient_accumulation_steps": 1,
    },
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_the_same_to_the_bit(case, tmp_path):
    expected = run(tmp_path, "none", **RUNS[case])
    trainer = run(tmp_path, "1GB", **RUNS[case])
    assert expected.counts == [None] * len(expected.counts)
    assert trainer.counts[-1] == 2 * (1 + (case == "encoder-decoder"))
    assert_equal(trainer, expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_4_bit_model_with_an_adapter(bf16, tmp_path):
    make_model("mistral", make_tokenizer()).save_pretrained(tmp_path / "full")

    def model():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "full", quantization_config=NF4Config()
        )

    expected = run(tmp_path, "none", model=model(), adapter=LORA, bf16=bf16)
    trainer = run(tmp_path, "1GB", model=model(), adapter=LORA, bf16=bf16)
    assert trainer.counts[-1] == 2
    assert_equal(trainer, expected)


def test_auto_waits_for_the_state_of_the_optimizer(tmp_path, caplog):
    caplog.set_level(logging.INFO, "oddsmith.training.activation_hooks")
    trainer = run(tmp_path, "auto")
    assert trainer.counts == [1, 0, 2, 2, 2, 2]
    lines = [line for line in caplog.messages if line.startswith("Activations")]
    assert len(lines) == 1 and "of the last 2 of 2 layers are kept" in lines[0]


def test_it_is_the_default():
    assert ORPOConfig(use_cpu=True).activation_budget == "auto"


def test_without_checkpointing_nothing_is_recomputed(tmp_path):
    assert run(tmp_path, "auto", gradient_checkpointing=False).counts == [None] * 6


def test_a_loop_without_train_is_not_checkpointed(tmp_path, caplog):
    trainer = trainer_for(tmp_path, "auto")
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch)
    assert trainer.counts == [None] and "activation_budget" not in caplog.text


def test_a_long_batch_keeps_fewer_layers(tmp_path):
    single = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 8,
    }
    once = run(tmp_path, "1GB", **single)
    assert once.counts[1:] == [2] * 7
    some = run(tmp_path, 500_000, **single)
    assert {0, 2} <= set(some.counts[1:])
    assert_equal(some, once)


def test_the_model_is_as_before_afterwards(tmp_path):
    model = make_model("mistral", make_tokenizer())
    before = [set(vars(layer)) for layer in model.model.layers]
    run(tmp_path, "1GB", model=model)
    assert [set(vars(layer)) for layer in model.model.layers] == before


# ---- Where it has no effect ----


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"torch_compile": True}, "torch_compile decides what is recomputed"),
        ({"zero": 3}, "DeepSpeed ZeRO-3 exchanges data once more when a layer is recomputed"),
        ({"fsdp": 1}, "FSDP1 exchanges data once more when a layer is recomputed"),
        ({"tensor": 2}, "tensor parallelism exchanges data once more when a layer is recomputed"),
    ],
)
def test_engines_that_decide_themselves(changed, reason, tmp_path, monkeypatch, caplog):
    from oddsmith.training import activation_hooks
    from oddsmith.training.engine import Engine

    activation_hooks.logger.warning_once.cache_clear()
    trainer = trainer_for(tmp_path, "auto")
    checkpointed(trainer.model)
    if "torch_compile" in changed:
        trainer.args.torch_compile = True
    else:
        monkeypatch.setattr(activation_hooks, "engine_of", lambda *_: Engine(**changed))
    assert trainer._new_budget(trainer.model) is None
    assert f"activation_budget has no effect, because {reason}." in caplog.text


def test_devices_whose_memory_is_not_known(tmp_path, caplog):
    trainer = trainer_for(tmp_path, "auto")
    checkpointed(trainer.model)
    trainer.args = SimpleNamespace(
        device=torch.device("mps"),
        activation_budget="auto",
        gradient_checkpointing=True,
        torch_compile=False,
        fsdp=None,
        deepspeed=None,
    )
    assert trainer._new_budget(trainer.model) is None
    assert "it is not known how much memory of mps is free" in caplog.text
    trainer.args.activation_budget = 1000
    assert trainer._new_budget(trainer.model) is not None


# ---- Memory runs out ----


class RunsOut(Watched):
    """Runs out of memory once, before or after the backward pass, at a micro-batch that keeps layers."""

    fails_at, after, batches = 4, False, 0

    def compute_loss(self, *args, **kwargs):
        self.batches += 1
        loss = super().compute_loss(*args, **kwargs)
        if self.batches == self.fails_at:
            if self.after:
                loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


@pytest.mark.parametrize("fails_at, after", [(4, False), (3, False), (3, True)])
def test_a_batch_is_repeated(fails_at, after, tmp_path, caplog):
    kind = type("Case", (RunsOut,), {"fails_at": fails_at, "after": after})
    options = {"disable_dropout": False, "adapter": LORA}
    expected = run(tmp_path, "none", **options)
    trainer = run(tmp_path, "1GB", kind=kind, **options)
    assert trainer.batches == 7 and trainer.counts[fails_at - 1] == 0 and trainer.counts[-1] == 2
    assert "Memory ran out with the activations of 2 layers kept" in caplog.text
    assert "activation_budget is 500 MB from now on" in caplog.text
    assert_equal(trainer, expected)


def test_gradients_of_two_batches_cannot_be_told_apart(tmp_path):
    kind = type("Case", (RunsOut,), {"after": True})
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(tmp_path, "1GB", kind=kind)
    assert getattr(caught.value, "__notes__", [""]) in (
        ["Less activation_budget than now, or 'none', needs less memory."],
        [""],
    )


def test_memory_that_runs_out_without_kept_layers(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, 1, kind=RunsOut)


# ---- The argument ----


@pytest.mark.parametrize(
    "given, read",
    [
        ("auto", "auto"),
        ("none", None),
        (None, None),
        (12345, 12345),
        ("12345", 12345),
        ("4GB", 4 * 10**9),
        ("512MiB", 512 * 2**20),
    ],
)
def test_sizes(given, read):
    config = ORPOConfig(use_cpu=True, activation_budget=given)
    assert config.activation_budget == read
    again = ORPOConfig(use_cpu=True, activation_budget=config.activation_budget)
    assert again.activation_budget == read


@pytest.mark.parametrize("given", [0, -1, True, "much", "4 apples", 1.5, "-3GB", [1]])
def test_what_is_no_size(given):
    with pytest.raises(
        ValueError, match="activation_budget is .*; must be a positive number of bytes"
    ):
        ORPOConfig(use_cpu=True, activation_budget=given)
