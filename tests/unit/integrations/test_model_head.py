"""The fused head inside a model: which rows, which models, and that nothing else changes."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.integrations.head_probe import HeadMismatch, find_head, probe_head
from oddsmith.integrations.model_head import FusedBatch, check, fused_loss
from support.trainer_runs import DECODERS, arguments, make_model, make_tokenizer, pairs

# PEFT reads a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
OBJECTIVE = {"beta": 0.7, "odds_ratio_link": "logsigmoid", "logits_budget": None}


def test_rows_by_hand():
    """One pair, T = 5: chosen 10 11 | 12 13 and a pad, rejected 10 | 21 22 23 24."""
    ids = torch.tensor([[10, 11, 12, 13, 0], [10, 21, 22, 23, 24]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 12, 13, -100], [-100, 21, 22, 23, 24]])
    batch = FusedBatch.build(ids, mask, labels, nll_scope="full", **OBJECTIVE)
    # The last real position of each sequence predicts nothing, nor does the pad.
    assert batch.rows.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert batch.targets.tolist() == [11, 12, 13, 21, 22, 23, 24]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.completion.tolist() == [False, True, True, True, True, True, True]
    assert (batch.positions, batch.num_pairs, batch.beta) == (10, 1, 0.7)


def test_prompts_need_no_head_where_no_term_has_them():
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    labels = torch.tensor([[-100, -100, 7], [-100, -100, 8]])
    mask = torch.ones_like(ids)
    full = FusedBatch.build(ids, mask, labels, nll_scope="full", **OBJECTIVE)
    assert full.targets.tolist() == [6, 7, -100, 8]
    completion = FusedBatch.build(ids, mask, labels, nll_scope="completion", **OBJECTIVE)
    assert completion.targets.tolist() == [-100, 7, -100, 8]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_row_on_either_side(side):
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    pad = torch.zeros(2, 2, dtype=torch.int64)
    labels = torch.tensor([[-100, 2, 3], [-100, 2, 4]])
    join = (lambda x, p: [p, x]) if side == "left" else (lambda x, p: [x, p])
    batch = FusedBatch.build(
        torch.cat(join(ids, pad), 1),
        torch.cat(join(torch.ones_like(ids), pad), 1),
        torch.cat(join(labels, pad - 100), 1),
        nll_scope="full",
        **OBJECTIVE,
    )
    start = 2 if side == "left" else 0
    assert batch.rows.tolist() == [start, start + 1, 5 + start, 6 + start]
    assert batch.targets.tolist() == [2, 3, 2, 4]


EXPECTED = {
    "gemma2_softcap": (2.5, 1.0),
    "cohere_scale": (None, 0.4),
    "granite_scale": (None, 1 / 3),
}


@pytest.mark.parametrize("name", DECODERS)
def test_probe_finds_softcap_and_scale(name):
    model = make_model(name, make_tokenizer())
    softcap, scale = EXPECTED.get(name, (None, 1.0))
    found = probe_head(model)
    assert found.softcap == softcap
    assert found.scale == pytest.approx(scale)


def test_probe_needs_no_weights():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert probe_head(model) == (None, 1.0)


class Squared(LlamaForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * outputs.logits.abs()
        return outputs


class Twice(LlamaForCausalLM):
    """Calls its head on the first and the other positions."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = torch.cat([self.lm_head(hidden[:, :1]), self.lm_head(hidden[:, 1:])], 1)
        return type("Outputs", (), {"logits": logits})()


class Cut(LlamaForCausalLM):
    """Leaves out the end of the vocabulary."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits[..., :-3]
        return outputs


def llama(kind=LlamaForCausalLM, **extra):
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return kind(LlamaConfig(vocab_size=len(make_tokenizer()), **sizes, **heads, **extra))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Squared, "more than the known softcap or scale"),
        (Twice, "must be once with all positions"),
        (Cut, "it makes logits"),
    ],
)
def test_unknown_treatment_of_logits_is_found(kind, reason):
    with pytest.raises(HeadMismatch, match=reason):
        check(llama(kind))


def test_hook_that_changes_logits_is_found():
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1.0)
    with pytest.raises(HeadMismatch, match="known softcap"):
        check(model)


class LinearWithTwist(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1.0


def test_head_of_another_kind_is_found():
    model = llama()
    model.lm_head = LinearWithTwist(32, model.config.vocab_size)
    with pytest.raises(HeadMismatch, match="LinearWithTwist, not a torch.nn.Linear"):
        check(model)


def inputs():
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_nothing_changes_without_a_batch():
    model = llama().eval()
    before, keys = model(**inputs()).logits, set(model.state_dict())
    signature = inspect.signature(model.forward)
    text = model.generate(**inputs(), do_sample=False, max_new_tokens=5, pad_token_id=0)
    check(model)
    torch.testing.assert_close(model(**inputs()).logits, before, rtol=0, atol=0)
    assert inspect.signature(model.forward) == signature
    assert set(model.state_dict()) == keys
    again = model.generate(**inputs(), do_sample=False, max_new_tokens=5, pad_token_id=0)
    assert again.tolist() == text.tolist()
    assert "forward" not in vars(model.lm_head)


def fused_batch():
    given = inputs()
    labels = given["input_ids"].clone()
    labels[:, :4] = -100
    return FusedBatch.build(
        given["input_ids"], given["attention_mask"], labels, nll_scope="full", **OBJECTIVE
    )


def test_a_copy_runs_on_its_own_weights():
    model = llama()
    check(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(3.0)
    batch = fused_batch()
    one, other = (fused_loss(m, batch, **inputs()) for m in (model, twin))
    assert abs(one.loss - other.loss) > 0.1
    other.loss.backward()
    assert model.lm_head.weight.grad is None and twin.lm_head.weight.grad is not None


def test_the_head_is_restored_after_an_error():
    model = llama()
    check(model)
    given = {name: x[:, :5] for name, x in inputs().items()}
    with pytest.raises(RuntimeError, match="for 18 positions; set use_fused_head=False"):
        fused_loss(model, fused_batch(), **given)
    assert "forward" not in vars(model.lm_head)
    assert model(**given).logits.shape == (2, 5, model.config.vocab_size)


def test_hooks_of_the_head_run():
    """FSDP, ZeRO-3 and offloading gather the weights in them; backward ones too."""
    model = llama()
    check(model)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.lm_head.register_forward_hook(lambda *_: seen.append("after"))
    model.lm_head.register_full_backward_pre_hook(lambda *_: seen.append("backward"))
    fused_loss(model, fused_batch(), **inputs()).loss.backward()
    assert seen == ["before", "after", "backward"]


def trainer_for(model, tmp_path, tokenizer=None, kind=ORPOTrainer, peft_config=None, **changed):
    tokenizer = tokenizer or make_tokenizer()
    args = ORPOConfig(**arguments(tmp_path), **changed)
    return kind(
        model, args, train_dataset=pairs(6), processing_class=tokenizer, peft_config=peft_config
    )


def first_batch(trainer, size=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(size)])


def loss_metrics_gradients(model, tmp_path, batch_of=first_batch, **changed):
    """Of one batch; the gradients by name."""
    trainer = trainer_for(copy.deepcopy(model), tmp_path, **changed)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    loss.backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return trainer, loss.detach(), metrics, grads


def assert_same(one, other):
    assert one[0]._plain_because is None and other[0]._plain_because is not None
    torch.testing.assert_close(one[1], other[1], rtol=2e-6, atol=2e-6)
    assert set(one[2]) == set(other[2])
    for name, value in other[2].items():
        torch.testing.assert_close(
            one[2][name].double(), value.double(), rtol=1e-5, atol=3e-6, msg=f"{name}"
        )
    assert set(one[3]) == set(other[3])
    for name, grad in other[3].items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(
            one[3][name], grad, rtol=1e-4, atol=2e-5 * scale + 1e-8, msg=name
        )


@pytest.mark.parametrize("name", DECODERS)
def test_same_as_through_logits(name, tmp_path):
    """Loss, metrics and the gradient of every weight; tied ones and capped logits among them."""
    model = make_model(name, make_tokenizer())
    fused = loss_metrics_gradients(model, tmp_path)
    plain = loss_metrics_gradients(model, tmp_path, use_fused_head=False)
    assert_same(fused, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"nll_scope": "completion"},
        {"odds_ratio_link": "identity"},
        {"nll_scope": "completion", "odds_ratio_link": "identity", "logits_budget": 40_000},
        {"label_pad_token_id": -7},
        {"padding_value": 5},
    ],
    ids=str,
)
def test_options_are_the_same_through_logits(options, tmp_path):
    model = make_model("qwen3_tied", make_tokenizer())
    fused = loss_metrics_gradients(model, tmp_path, **options)
    assert_same(fused, loss_metrics_gradients(model, tmp_path, use_fused_head=False, **options))


def with_empty_completion(trainer):
    batch = first_batch(trainer)
    batch["rejected_labels"][1] = -100
    return batch


def test_empty_completion_contributes_nothing(tmp_path):
    model = make_model("mistral", make_tokenizer())
    fused = loss_metrics_gradients(model, tmp_path, with_empty_completion)
    plain = loss_metrics_gradients(model, tmp_path, with_empty_completion, use_fused_head=False)
    assert_same(fused, plain)
    assert fused[2]["empty_completions"] == 1
    assert all(torch.isfinite(grad).all() for grad in fused[3].values())


def test_all_completions_empty(tmp_path):
    def empty(trainer):
        batch = first_batch(trainer)
        batch["rejected_labels"][:] = -100
        return batch

    model = make_model("mistral", make_tokenizer())
    fused = loss_metrics_gradients(model, tmp_path, empty)
    assert_same(fused, loss_metrics_gradients(model, tmp_path, empty, use_fused_head=False))
    torch.testing.assert_close(fused[1], fused[2]["nll_loss"])


def test_head_with_a_bias(tmp_path):
    model = llama()
    model.lm_head = nn.Linear(32, model.config.vocab_size)
    fused = loss_metrics_gradients(model, tmp_path)
    assert_same(fused, loss_metrics_gradients(model, tmp_path, use_fused_head=False))
    assert fused[3]["lm_head.bias"].abs().max() > 0


def test_adapter_on_the_head_goes_through_logits(tmp_path, caplog):
    from peft import LoraConfig

    peft_config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    trainer = trainer_for(llama(), tmp_path, peft_config=peft_config)
    assert "from logits, not in the fused head: its output head is a peft" in caplog.text
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, first_batch(trainer))
    loss.backward()
    head = find_lora(trainer.model, "lm_head")
    assert head.lora_B["default"].weight.grad.abs().max() > 0


def find_lora(model, name):
    return next(m for n, m in model.named_modules() if n.endswith(name) and hasattr(m, "lora_B"))


def test_saved_module_is_the_active_one():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(llama(), config)
    wrapper = model.get_base_model().lm_head
    assert find_head(model.get_base_model()) is wrapper.modules_to_save["default"]
    with model.disable_adapter():
        assert find_head(model.get_base_model()) is wrapper.original_module


def test_autocast_leaves_a_loss_close_to_float32(tmp_path):
    model = make_model("mistral", make_tokenizer())
    trainer = trainer_for(model, tmp_path)
    batch = first_batch(trainer)
    exact, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) / exact < 2e-2 and loss != exact
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_bfloat16_weights(tmp_path):
    model = make_model("qwen3_tied", make_tokenizer())
    _, exact, _, _ = loss_metrics_gradients(model, tmp_path)
    trainer, loss, _, grads = loss_metrics_gradients(model.bfloat16(), tmp_path)
    assert trainer._plain_because is None
    assert abs(loss - exact) / exact < 2e-2
    assert grads["model.embed_tokens.weight"].dtype == torch.bfloat16
