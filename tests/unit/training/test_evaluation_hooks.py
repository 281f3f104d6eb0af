"""What happens to an evaluation batch and set."""

from support.trainer_runs import batch_of


def test_prediction_step(make):
    trainer = make()
    inputs = batch_of(trainer)
    loss, logits, labels = trainer.prediction_step(trainer.model, inputs, False)
    assert logits.shape == labels.shape == (2,) and not loss.requires_grad
    assert trainer.prediction_step(trainer.model, inputs, True)[1:] == (None, None)
    _, kept, _ = trainer.prediction_step(
        trainer.model, inputs, False, ignore_keys=["eval_logits/chosen"]
    )
    assert kept.tolist() == logits[1:].tolist()
