"""The user's model after a run, or after a run that failed: as it came, for whatever comes next."""

import copy
import gc
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from oddsmith import ORPOConfig, ORPOTrainer
from support.trainer_runs import arguments, make_tokenizer, pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def make_model(lora=False, dtype=torch.float32):
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        attention_dropout=0.1,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if lora:
        adapter = LoraConfig(
            r=2, target_modules=["q_proj"], lora_dropout=0.2, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, adapter, autocast_adapter_dtype=dtype == torch.float32)
    return model


def make_trainer(model, tmp_path, kind=ORPOTrainer, callbacks=None, **changed):
    args = arguments(
        tmp_path, **{"max_steps": 1, "gradient_accumulation_steps": 1, "max_length": 48, **changed}
    )
    return kind(
        model=model,
        args=ORPOConfig(**args),
        train_dataset=pairs(4),
        eval_dataset=pairs(2),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )


# What transformers' own Trainer changes as well.
THEIRS = {"training", "model_tags", "_is_accelerate_prepared", "_original_forward"}


def state_of(model, mixed=False):
    """All there is to a model but its weights."""
    gc.collect()
    hidden = {"_modules", "_parameters", "_buffers", "config", "generation_config", *THEIRS}
    hidden |= {"forward"} if mixed else set()  # accelerate's, around the model's own
    modules = {
        name: (
            type(module),
            {k: repr(v) for k, v in vars(module).items() if k not in hidden},
        )
        for name, module in model.named_modules()
    }
    config = {**model.config.to_dict(), "use_cache": None}
    parameters = {
        name: (p.requires_grad, p.dtype, len(p._post_accumulate_grad_hooks or ()))
        for name, p in model.named_parameters()
    }
    attention = model.config._attn_implementation
    return modules, config, parameters, attention, dict(AttentionInterface())


PATHS = {
    "packed": {},
    "padded": {"padding_free": False},
    "plain": {"use_fused_head": False},
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("path", PATHS)
def test_after_every_kind_of_run(path, lora, tmp_path):
    model = make_model(lora)
    before = state_of(model)
    reentrant = {"use_reentrant": True}
    trainer = make_trainer(
        model,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=reentrant,
        **PATHS[path],
    )
    assert (trainer._plain_because is None) == (path != "plain")
    assert (trainer._padded_because is None) == (path == "packed") or path == "plain"
    assert state_of(model) == before
    trainer.evaluate()
    assert state_of(model) == before
    trainer.train()
    assert state_of(model) == before
    trainer.predict(trainer.eval_dataset)
    assert state_of(model) == before
    pickle.dumps(model)


def test_after_a_run_in_bfloat16(tmp_path):
    model = make_model(dtype=torch.bfloat16)
    before = state_of(model)
    make_trainer(model, tmp_path).train()
    assert state_of(model) == before


class Fails(ORPOTrainer):
    def training_step(self, *args, **kwargs):
        super().training_step(*args, **kwargs)
        raise ZeroDivisionError

    def prediction_step(self, *args, **kwargs):
        super().prediction_step(*args, **kwargs)
        raise ZeroDivisionError


@pytest.mark.parametrize("call", ["train", "evaluate", "predict"])
def test_after_a_run_that_fails(call, tmp_path):
    model = make_model()
    before = state_of(model)
    trainer = make_trainer(model, tmp_path, kind=Fails)
    given = (trainer.eval_dataset,) if call == "predict" else ()
    with pytest.raises(ZeroDivisionError):
        getattr(trainer, call)(*given)
    assert state_of(model) == before


class Saves(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, model, **kwargs):
        self.rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
        self.functional = {m.attention_dropout for m in model.modules() if hasattr(m, "q_proj")}
        model.save_pretrained(self.folder / "by_hand")


def test_what_is_saved_within_a_run_names_the_users_attention(tmp_path):
    saves = Saves(tmp_path)
    model = make_model()
    trainer = make_trainer(model, tmp_path, callbacks=[saves], save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert saves.functional == {0.0}
    for folder in ("by_hand", "checkpoint-1", "."):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert "oddsmith" not in str({k: v for k, v in config.items() if k != "model_tags"})
        assert config.get("attn_implementation") in (None, "sdpa")
        assert config["attention_dropout"] == 0.1


# ---- What comes next ----


def loss_of(model, tmp_path, **changed):
    """A second run, of one step."""
    trainer = make_trainer(model, tmp_path / "second", **changed)
    assert trainer._plain_because is None and trainer._padded_because is None
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def through_pickle(model, trainer, tmp_path):
    return pickle.loads(pickle.dumps(model))


def through_a_copy(model, trainer, tmp_path):
    return copy.deepcopy(model)


def through_torch_save(model, trainer, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


def through_a_folder(model, trainer, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def unwrapped(model, trainer, tmp_path):
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def itself(model, trainer, tmp_path):
    return model


@pytest.mark.parametrize(
    "way",
    [through_pickle, through_a_copy, through_torch_save, through_a_folder, unwrapped, itself],
    ids=lambda way: way.__name__,
)
def test_a_trained_model_can_be_trained_again(way, tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    expected = copy.deepcopy(model.state_dict())
    model = way(model, trainer, tmp_path)
    fresh = make_model()
    fresh.load_state_dict(expected)
    assert loss_of(model, tmp_path) == pytest.approx(loss_of(fresh, tmp_path), rel=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_of_mixed_precision_can_be_trained_again(keep, tmp_path):
    """Accelerate puts a forward of its own around the model's, and takes it off again by its names."""
    model = make_model()
    before = state_of(model, mixed=True)
    trainer = make_trainer(model, tmp_path, bf16=True)
    trainer.train()
    assert state_of(model, mixed=True) == before
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=keep)
    assert loss_of(model, tmp_path, bf16=True) > 0
    assert model(torch.arange(4)[None]).logits.shape == (1, 4, model.config.vocab_size)


def test_merged_adapters_can_be_trained_again(tmp_path):
    model = make_model(lora=True)
    make_trainer(model, tmp_path).train()
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="no parameter of the LlamaForCausalLM is trainable"):
        loss_of(merged, tmp_path)  # LoRA has frozen them
    merged.requires_grad_(True)
    assert type(merged) is LlamaForCausalLM
    merged.requires_grad_(True)  # peft leaves the weights frozen
    assert loss_of(merged, tmp_path) > 0
    assert {m.attention_dropout for m in merged.modules() if hasattr(m, "q_proj")} == {0.1}


def test_two_trainers_of_one_model_take_turns(tmp_path):
    model = make_model()
    before = state_of(model)
    one = make_trainer(model, tmp_path / "one", beta=0.9)
    other = make_trainer(
        model, tmp_path / "other", padding_free=False, disable_dropout=False, nll_scope="completion"
    )
    model.eval()
    losses = []
    for trainer in (one, other, one, other):
        batch = trainer.data_collator(list(trainer.train_dataset))
        losses.append(float(trainer.get_batch_loss_metrics(model, batch)[0].detach()))
    assert losses[:2] == pytest.approx(losses[2:])
    assert abs(losses[0] - losses[1]) > 0.1
    one.train()
    other.train()
    one.evaluate()
    del one, other, trainer  # what they have borrowed for the calls above comes back
    assert state_of(model) == before


class WithinAnother(TrainerCallback):
    """Trains the same model with another trainer in the middle of a run."""

    def on_step_end(self, args, state, control, model, **kwargs):
        self.other.train()
        self.functional = {m.attention_dropout for m in model.modules() if hasattr(m, "q_proj")}


def test_a_run_within_a_run(tmp_path):
    model = make_model()
    before, within = state_of(model), WithinAnother()
    within.other = make_trainer(model, tmp_path / "other")
    make_trainer(model, tmp_path / "one", callbacks=[within]).train()
    assert within.functional == {0.0}
    assert state_of(model) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_custom_training_loop(reentrant, tmp_path):
    """Checkpoints compute layers again in the backward pass, after the hook has returned."""
    model = make_model()
    before = state_of(model)
    trainer = make_trainer(model, tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset))

    def gradients():
        model.zero_grad()
        trainer.compute_loss(model.train(), batch).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "q_proj")} == {0.0}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(), expected)
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    trainer.evaluate()
    assert state_of(model) == before


def test_the_forward_with_logits_has_no_dropout_as_a_first_call(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset))
    logps = trainer.concatenated_forward(model.train(), batch)[0]
    expected = trainer.concatenated_forward(model.eval(), batch)[0]
    torch.testing.assert_close(logps, expected)


def test_a_changed_attention_is_noticed(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    model.set_attn_implementation("eager")
    batch = trainer.data_collator(list(trainer.train_dataset))
    with pytest.raises(RuntimeError, match="attention did not get the packed row"):
        trainer.get_batch_loss_metrics(model, batch)


def test_layerwise_hooks_are_off_between_runs(tmp_path):
    model = make_model()
    before = state_of(model)
    trainer = make_trainer(
        model,
        tmp_path,
        optim="galore_adamw_layerwise",
        optim_target_modules="all-linear",
        optim_args="rank=4",
    )
    trainer.train()
    assert state_of(model) == before
    weights = copy.deepcopy(model.state_dict())
    model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    assert model.lm_head.weight.grad is not None  # nobody has used it and thrown it away
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    model.zero_grad()
    # A look at the loss without gradients attaches none of them.
    trainer.prediction_step(model, trainer.data_collator(list(trainer.train_dataset)), True)
    model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()
    trainer.args.max_steps = 2
    trainer.train()
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert state_of(model) == before


def test_a_second_trainer_trains_after_a_look_by_a_layerwise_one(tmp_path):
    model = make_model()
    layerwise = {"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}
    first = make_trainer(model, tmp_path, **layerwise, optim_args="rank=4")
    first.train()
    first.compute_loss(model, first.data_collator(list(first.train_dataset)))  # attaches its hooks
    weights = copy.deepcopy(model.state_dict())
    make_trainer(model, tmp_path, max_steps=2).train()  # the first step warms up
    moved = [name for name, value in model.state_dict().items() if not value.equal(weights[name])]
    assert len(moved) == len(weights)
    first.train()  # takes its hooks back


# ---- Other trainers ----


def test_transformers_own_trainer_and_generation(tmp_path):
    model = make_model()
    make_trainer(model, tmp_path).train()
    rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}] * 2
    given = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, **given)
    result = Trainer(model=model, args=args, train_dataset=rows).train()
    assert result.training_loss > 0
    tokens = torch.arange(3, 8)[None]
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, pad_token_id=0
    )
    assert made.shape[1] > 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainers_of_trl_train_the_model_afterwards(kind, tmp_path):
    trl = pytest.importorskip("trl")
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    make_trainer(model, tmp_path).train()
    given = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), bf16=False, **given)
    rows = pairs(4)
    if kind == "SFT":
        rows = rows.rename_column("chosen", "completion").remove_columns("rejected")
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=args, train_dataset=rows, processing_class=make_tokenizer()
    )
    assert trainer.train().training_loss > 0
