"""Every method of peft and every option that touches the model, packed, padded and from logits."""

import copy

import pytest
import torch
from peft import get_peft_model

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.integrations.row_dependence import RULES, TOKENWISE_METHODS, row_dependence
from oddsmith.training.models import check_adapter
from support.peft_methods import METHODS, OWN_TASKS, UNAVAILABLE, method_config
from support.trainer_runs import arguments, batch_of, make_model, make_tokenizer, pairs, train_logs

# peft and some of its methods warn of their own matters.
pytestmark = pytest.mark.filterwarnings("ignore")

PATHS = ("packed", "padded", "plain")
# Methods that cannot be trained on pairs by any path, and what their own code says.
UNTRAINABLE = {**UNAVAILABLE, **dict.fromkeys(OWN_TASKS, "needs the ids of tasks")}
# The path of methods that do not work token by token.
ON_PADDED = {"ADAPTION_PROMPT", "LILY", "POLY", "PVERA", "SHADOW", "XLORA"}
ON_PLAIN = {
    "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
}  # fmt: skip

LORA = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "rows of tokens": {"trainable_token_indices": [3, 4, 9]},
    "activated": {"alora_invocation_tokens": None},  # one of the batch
}
TIED = {
    "one end": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both ends": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "adapters": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "rows of tokens": {"trainable_token_indices": [3, 4, 9], "ensure_weight_tying": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer):
    return make_model("mistral", tokenizer)


@pytest.fixture(scope="module")
def trainer(base, tokenizer, tmp_path_factory):
    args = ORPOConfig(
        **arguments(tmp_path_factory.mktemp("run"), gradient_checkpointing=False, max_length=40)
    )
    model = copy.deepcopy(base)
    return ORPOTrainer(model, args, train_dataset=pairs(4), processing_class=tokenizer)


@pytest.fixture(scope="module")
def tokens(trainer):
    """Tokens of the compared batch, in its completions."""
    return batch_of(trainer)["chosen_input_ids"][0, -3:].tolist()


def adapted(model, config):
    torch.manual_seed(2)
    model = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:  # not the neutral start
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def loss_and_gradients(trainer, model, path):
    trainer._choose_path(model)
    if path != "packed":
        trainer._padded_because = trainer._padded_because or "the test"
    if path == "plain":
        trainer._plain_because = trainer._plain_because or "the test"
    model.zero_grad()
    model.train()
    torch.manual_seed(8)  # for adapters that draw noise
    loss, _ = trainer.get_batch_loss_metrics(model, batch_of(trainer))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def compare(trainer, model):
    """Runs a model on all paths; returns why it is not packed and why not in the fused head."""
    trainer._lend(model)
    expected, theirs = loss_and_gradients(trainer, model, "plain")
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert any(theirs[name].abs().max() > 0 for name in trained & theirs.keys())
    for path in ("packed", "padded"):
        loss, grads = loss_and_gradients(trainer, model, path)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert grads.keys() == theirs.keys()
        torch.testing.assert_close(grads, theirs, rtol=1e-4, atol=1e-5)
    trainer._choose_path(model)
    return trainer._padded_because, trainer._plain_because


def test_every_method_has_its_path():
    assert not TOKENWISE_METHODS & (ON_PADDED | ON_PLAIN)
    assert {*METHODS} <= TOKENWISE_METHODS | ON_PADDED | ON_PLAIN
    assert {rule.path for rule in RULES} == {"padded", "plain"}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_peft(name, trainer, base, tokens):
    if name in ("POLY", "MULTITASK_PROMPT_TUNING"):
        with pytest.raises(
            ValueError, match=rf"the adapter is {name}, .* preference rows have none"
        ):
            check_adapter(adapted(base, method_config(name)))
        return
    if UNTRAINABLE.get(name):
        pytest.skip(UNTRAINABLE[name])
    own = {"token_indices": sorted(set(tokens))} if name == "TRAINABLE_TOKENS" else {}
    model = adapted(base, method_config(name, **own))
    padded, plain = compare(trainer, model)
    if name in ON_PLAIN:
        assert plain == f"its adapter ({name}) puts virtual tokens in front of each row"
    elif name in ON_PADDED:
        assert padded == f"its adapter ({name}) is not known to work token by token"
    else:
        assert padded is None and plain is None


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_forms_of_lora(options, trainer, base, tokens):
    if "alora_invocation_tokens" in options:
        options = {"alora_invocation_tokens": tokens[:1]}
    padded, plain = compare(trainer, adapted(base, method_config("LORA", **options)))
    if "alora_invocation_tokens" in options:
        assert "activated LoRA" in padded
    elif options.get("target_modules") != ["lm_head", "q_proj"]:
        assert padded is None and plain is None


def test_the_regulariser_of_adalora_is_in_no_loss(trainer, base):
    # peft adds it to the loss of a model's output. As in TRL, the output has none.
    first, second = (
        adapted(base, method_config("ADALORA", orth_reg_weight=weight)) for weight in (0.0, 1e4)
    )
    for model in (first, second):
        trainer._lend(model)
    for path in PATHS:
        expected, theirs = loss_and_gradients(trainer, first, path)
        loss, grads = loss_and_gradients(trainer, second, path)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        torch.testing.assert_close(grads, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("options", TIED.values(), ids=TIED)
def test_tied_embeddings(options, trainer, tokenizer):
    model = make_model("qwen3_tied", tokenizer)
    padded, plain = compare(trainer, adapted(model, method_config("LORA", **options)))
    if "target_modules" not in options:
        assert padded is None and plain is None


# ---- Options ----


def logs(tmp_path, tokenizer, model, path, **changed):
    changed |= {"padded": {"padding_free": False}, "plain": {"use_fused_head": False}}.get(path, {})
    args = arguments(tmp_path, max_steps=2, max_length=40, **changed)
    trainer = ORPOTrainer(
        copy.deepcopy(model), ORPOConfig(**args), train_dataset=pairs(4), processing_class=tokenizer
    )
    trainer.train()
    names = ("loss", "nll_loss", "rewards/rejected", "grad_norm")
    return trainer, [[entry[name] for name in names] for entry in train_logs(trainer)]


OPTIONS = {
    "checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointing without reentry": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "no checkpointing": {"gradient_checkpointing": False},
    "neftune": {"neftune_noise_alpha": 7.0},
    "dropout": {"disable_dropout": False},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager",
                 "gradient_checkpointing": False},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_that_touch_the_model(options, tmp_path, tokenizer, base):
    _, expected = logs(tmp_path, tokenizer, base, "plain", **options)
    for path in ("packed", "padded"):
        trainer, found = logs(tmp_path, tokenizer, base, path, **options)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-5)
    because = (
        trainer._padded_because
        if path == "packed"
        else row_dependence(trainer.model, trainer.args, "padded")
    )
    assert (because is None) == (not {"neftune_noise_alpha", "torch_compile"} & options.keys())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_compiled_model_is_taken(fused, tmp_path, tokenizer, base):
    compiled = torch.compile(copy.deepcopy(base), backend="eager")
    options = {"max_steps": 2, "max_length": 40, "gradient_checkpointing": False}
    args = ORPOConfig(**arguments(tmp_path, **options, use_fused_head=fused))
    trainer = ORPOTrainer(compiled, args, train_dataset=pairs(4), processing_class=tokenizer)
    (reason,) = trainer.path.reasons
    assert ("compiled again for the lengths" if fused else "use_fused_head is False") in reason
    trainer.train()
    _, expected = logs(tmp_path, tokenizer, base, "plain", gradient_checkpointing=False)
    found = [entry["loss"] for entry in train_logs(trainer)]
    assert found == pytest.approx([each[0] for each in expected], rel=2e-5)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_the_loss_kernels_of_liger_are_left_out(tmp_path, tokenizer, base, monkeypatch, log):
    given = []

    def apply(model, kernels):
        given.append(kernels)
        if kernels.get("fused_linear_cross_entropy", True):  # as Liger does by default
            model.forward = lambda *args, **kwargs: 1 / 0

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    # Not installed, so that a CPU is no error.
    monkeypatch.setattr("oddsmith.training.current_args.is_liger_kernel_available", lambda: False)
    options = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
    trainer, found = logs(tmp_path, tokenizer, base, "packed", **options)
    assert given == [{"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert trainer._padded_because is None
    assert found == logs(tmp_path, tokenizer, base, "packed")[1]
    logs(
        tmp_path, tokenizer, base, "packed", use_liger_kernel=True,
        liger_kernel_config={"fused_linear_cross_entropy": True},
    )  # fmt: skip
    assert any("the loss kernels are left out" in line for line in log.messages)


def test_liger_on_a_cpu_is_one_sentence(tmp_path, tokenizer, base, monkeypatch):
    monkeypatch.setattr("oddsmith.training.current_args.is_liger_kernel_available", lambda: True)
    with pytest.raises(ValueError, match="use_liger_kernel is True on a CPU: Liger's kernels run"):
        logs(tmp_path, tokenizer, base, "packed", use_liger_kernel=True)
