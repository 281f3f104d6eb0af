"""How a batch becomes a loss: in the head, from logits, and through hooks of one's own."""

import copy

import pytest
import torch

from oddsmith import ORPOTrainer
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
    assert f"Own has its own {hook}" in caplog.text
    loss, _ = own.get_batch_loss_metrics(own.model, batch_of(own))
    assert calls == [hook]
    expected, _ = plain.get_batch_loss_metrics(plain.model, batch_of(plain))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_an_own_odds_ratio_decides_the_loss(make):
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
