"""The loss of a batch: in the head, from logits, and through overridden hooks."""

import copy
import math

import pytest
import torch

from oddsmith import ORPOTrainer
from oddsmith.packing.batch import PackedBatch
from support.trainer_runs import batch_of, make_model


def test_concatenated_forward_arities(make, model, tokenizer):
    trainer = make()
    out = trainer.concatenated_forward(trainer.model, batch_of(trainer))
    assert len(out) == 5 and out[0].shape == (3,) and out[2].shape[2] == len(tokenizer)
    trainer = make(model=make_model("mixtral", tokenizer))
    out = trainer.concatenated_forward(trainer.model, batch_of(trainer))
    assert len(out) == 6 and out[5] > 0


@pytest.mark.parametrize("hook", ["concatenated_forward", "get_batch_logps", "odds_ratio_loss"])
def test_overridden_hooks_are_called(make, model, hook, caplog):
    calls = []

    def counted(original):
        def call(*args, **kwargs):
            calls.append(hook)
            return original(*args, **kwargs)

        return staticmethod(call) if hook == "get_batch_logps" else call

    plain = make(model=copy.deepcopy(model))
    kind = type("Own", (ORPOTrainer,), {hook: counted(getattr(ORPOTrainer, hook))})
    own = make(kind=kind, model=model)
    assert f"Own overrides {hook}" in caplog.text
    loss, _ = own.get_batch_loss_metrics(own.model, batch_of(own))
    assert calls == [hook]
    expected, _ = plain.get_batch_loss_metrics(plain.model, batch_of(plain))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_an_overridden_odds_ratio_decides_the_loss(make):
    class Own(ORPOTrainer):
        def odds_ratio_loss(self, policy_chosen_logps, policy_rejected_logps):
            term = policy_chosen_logps - policy_rejected_logps
            zero = torch.zeros(())
            return term, term.detach(), term.detach(), zero, zero

    trainer = make(kind=Own)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    expected = metrics["nll_loss"] - (metrics["logps/chosen"] - metrics["logps/rejected"])
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert metrics["rewards/margins"] == 0.0


def test_beta_may_be_changed_between_steps(make):
    trainer = make()
    inputs = batch_of(trainer)
    one, metrics = trainer.get_batch_loss_metrics(trainer.model, inputs)
    trainer.beta = 1.3
    other, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
    difference = -(1.3 - 0.3) * metrics["log_odds_ratio"]
    torch.testing.assert_close((other - one).double(), difference.double(), rtol=1e-4, atol=1e-5)


def test_sides_are_put_together():
    batch = {
        "chosen_input_ids": torch.tensor([[3, 4, 5]]), "chosen_labels": torch.tensor([[-100, 4, 5]]),
        "chosen_attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "rejected_input_ids": torch.tensor([[3, 6]]), "rejected_labels": torch.tensor([[-100, 6]]),
        "rejected_attention_mask": torch.ones(1, 2, dtype=torch.int64),
    }  # fmt: skip
    made = ORPOTrainer.concatenated_inputs(batch, padding_value=9)
    assert made["concatenated_input_ids"].tolist() == [[3, 4, 5], [3, 6, 9]]
    assert made["concatenated_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert made["concatenated_labels"].tolist() == [[-100, 4, 5], [-100, 6, -100]]


def test_logps_by_hand():
    # Two tokens; the first row's logits give them the odds 1 : 3.
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [5.0, 0.0]]])
    labels = torch.tensor([[0, 1, 0]])
    # Shifted: label 1 by the first logits, label 0 by the second.
    expected = math.log(3 / 4) + math.log(1 / 2)
    assert ORPOTrainer.get_batch_logps(logits, labels).item() == pytest.approx(expected)
    mean = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).item()
    assert mean == pytest.approx(expected / 2)
    # For an encoder-decoder, labels and logits are aligned: 0 and 1, masked at the end.
    aligned = ORPOTrainer.get_batch_logps(
        logits, torch.tensor([[0, 1, -100]]), is_encoder_decoder=True
    )
    assert aligned.item() == pytest.approx(math.log(1 / 4) + math.log(1 / 2))
    nothing = torch.full((1, 3), -100)
    assert ORPOTrainer.get_batch_logps(logits, nothing, average_log_prob=True).item() == 0.0
    with pytest.raises(ValueError, match=r"labels have shape \(1, 2\); must be .* \(1, 3\)"):
        ORPOTrainer.get_batch_logps(logits, labels[:, :2])


@pytest.mark.parametrize("link", ["logsigmoid", "identity"])
def test_the_odds_ratio_by_hand(make, link):
    trainer = make(config={"odds_ratio_link": link})
    chosen, rejected = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.2)])
    term, mine, theirs, ratio, log_odds = trainer.odds_ratio_loss(chosen, rejected)
    # Odds 1 and 1/4: their ratio is 4.
    assert log_odds.item() == pytest.approx(math.log(4.0), rel=1e-5)
    assert ratio.item() == pytest.approx(math.log(4 / 5), rel=1e-5)
    linked = math.log(4 / 5) if link == "logsigmoid" else math.log(4.0)
    assert term.item() == pytest.approx(0.3 * linked, rel=1e-5)
    assert mine.item() == pytest.approx(0.3 * math.log(0.5))
    assert theirs.item() == pytest.approx(0.3 * math.log(0.2))


@pytest.mark.parametrize("scope", ["full", "completion"])
def test_the_head_and_the_logits_agree(make, model, scope):
    fused = make(model=copy.deepcopy(model), config={"nll_scope": scope})
    plain = make(model=model, config={"nll_scope": scope, "use_fused_head": False})
    assert fused._plain_because is None and plain._plain_because == "use_fused_head is False"
    (loss, metrics), (truth, expected) = (
        each.get_batch_loss_metrics(each.model, batch_of(each), "eval") for each in (fused, plain)
    )
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    assert metrics.keys() == expected.keys() and all(name.startswith("eval_") for name in metrics)
    for name in expected:
        torch.testing.assert_close(
            metrics[name].double(), expected[name].double(), rtol=1e-4, atol=1e-5
        )


def test_a_pair_with_an_empty_completion_stays_out(make, model):
    trainers = [
        make(model=copy.deepcopy(model)),
        make(model=model, config={"use_fused_head": False}),
    ]
    losses = []
    for trainer in trainers:
        batch = batch_of(trainer)
        batch["rejected_labels"] = batch["rejected_labels"].clone()
        batch["rejected_labels"][1] = -100
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        assert metrics["empty_completions"] == 1 and loss.isfinite()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["packed", "padded", "plain"])
def test_beta_of_zero_trains_on_the_chosen_answers(make, path):
    options = {"packed": {}, "padded": {"padding_free": False}, "plain": {"use_fused_head": False}}
    trainer = make(config={"beta": 0, "bf16": False, **options[path]})
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    assert float(loss.detach()) == pytest.approx(float(metrics["nll_loss"]), rel=1e-6)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None)
    assert metrics["rewards/margins"] == 0 and metrics["log_odds_chosen"].isfinite()


def test_the_auxiliary_loss_is_a_metric(make, tokenizer):
    trainer = make(model=make_model("mixtral", tokenizer))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    parts = metrics["nll_loss"] - trainer.beta * metrics["log_odds_ratio"]
    expected = float(parts + trainer.aux_loss_coef * metrics["aux_loss"])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert metrics["aux_loss"] > 0 and not metrics["aux_loss"].requires_grad
    assert "aux_loss" not in make().get_batch_loss_metrics(make().model, batch_of(make()))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_beyond_the_limits_of_a_model_keep_their_padding(make, tokenizer, dtype, caplog):
    """Temperatures that rise with the place in the row."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 48, "intermediate_size": 40, "intermediate_size_mlp": 40}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}

    def tokens(rows):
        return PackedBatch.build(rows, "auto").input_ids.numel()

    rows = sorted(make().train_dataset, key=lambda row: tokens([row]))
    most = tokens(rows[:2])
    assert tokens(rows[-2:]) > most
    torch.manual_seed(0)
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=len(tokenizer),
            num_local_experts=2,
            head_dim=12,
            no_rope_layers=[1, 0],
            floor_scale=most + 1,
            attn_scale=2.0,
            initializer_range=0.15,
            pad_token_id=tokenizer.pad_token_id,
            **sizes,
        )
    ).to(dtype)
    trainer = make(model=copy.deepcopy(model))
    padded = make(model=model, config={"padding_free": False})
    assert trainer._row_limits.row == most and padded.path.batches == "padded"
    assert f"for batches of up to {most} tokens; others keep their padding" in str(trainer.path)
    runs = []
    counted = trainer._packed
    trainer._packed = lambda batch: runs.append(counted(batch)) or runs[-1]
    for part in (rows[:2], rows[-2:], rows[-3:]):
        batch = trainer.data_collator(part)
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
        expected, _ = padded.get_batch_loss_metrics(padded.model, batch)
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(loss, expected, rtol=close, atol=close)
    assert [run is None for run in runs] == [False, True, True]
    said = [line for line in caplog.messages if line.startswith("A batch keeps its padding")]
    assert said == [
        f"A batch keeps its padding: the model is packed for batches of up to {most} tokens "
        "only. This is logged once."
    ]


def test_a_model_in_double_keeps_its_digits(make):
    """From logits as in the head: a third of a pair, and a beta, have no float32 in between."""
    trainer = make()
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5, 9, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 9, (6, 5), generator=draw)
    labels[1] = -100  # no completion: its pair is left out
    found = trainer.get_batch_logps(logits, labels, average_log_prob=True)
    kept = labels[:, 1:] >= 0
    picked = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[:, :, 0]
    expected = (picked * kept).sum(-1) / kept.sum(-1).clamp(min=1)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    terms, *rewards, _, _ = trainer.odds_ratio_loss(found[[0, 2]], found[[3, 5]])
    odds = [logps - torch.log1p(-logps.exp()) for logps in (found[[0, 2]], found[[3, 5]])]
    linked = 0.3 * torch.nn.functional.logsigmoid(odds[0] - odds[1])
    torch.testing.assert_close(terms, linked, rtol=1e-12, atol=0)
    torch.testing.assert_close(rewards[0], 0.3 * found[[0, 2]], rtol=1e-13, atol=0)
    scores = (found[:3], found[3:], logits[:3], logits[3:], torch.zeros((), dtype=torch.float64))
    trainer.concatenated_forward = lambda *inputs: scores
    sides = {"chosen": labels[:3], "rejected": labels[3:]}
    batch = {f"{side}_labels": each for side, each in sides.items()}
    batch |= {f"{side}_input_ids": each.clamp(min=0) for side, each in sides.items()}
    batch |= {f"{side}_attention_mask": torch.ones_like(each) for side, each in sides.items()}
    loss = trainer._plain_scores(trainer.model, batch).loss
    torch.testing.assert_close(loss, -linked.sum() / 3, rtol=1e-12, atol=0)
