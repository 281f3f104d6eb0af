"""Evaluation of batches and datasets."""

import pytest
from datasets import Dataset, DatasetDict

from support.trainer_runs import batch_of, long_pairs, pairs


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


def test_another_collator_is_logged_once(make, log):
    batches = make().data_collator
    trainer = make(data_collator=lambda rows: batches(rows))
    for _ in range(2):
        trainer.prediction_step(trainer.model, batch_of(trainer), True)
    assert log.text.count("The evaluation step expects the batches of PreferenceCollator") == 1


def test_metrics_have_the_name_of_their_set(make):
    trainer = make(eval_dataset=pairs(4, seed=5))
    loader = trainer.get_eval_dataloader()
    output = trainer.evaluation_loop(loader, "x", True, metric_key_prefix="eval_hard")
    assert {"eval_hard_loss", "eval_hard_logps/chosen"} <= output.metrics.keys()
    assert all(name.startswith("eval_hard_") for name in output.metrics)
    assert output.num_samples == 4
    # The averages were read: the next set starts from zero.
    assert trainer._take_metrics("eval") == {}


def test_prompts_are_answered_with_room_for_a_token(make):
    trainer = make(config={"max_length": 30})
    batch = batch_of(trainer)
    prompts = batch["prompt_input_ids"]
    texts = trainer.generate_from_model(trainer.model, batch)
    assert len(texts) == len(prompts)
    for text, prompt in zip(texts, batch["prompt"], strict=True):
        words = trainer.processing_class.decode(
            trainer.processing_class(prompt, add_special_tokens=False)["input_ids"]
        )
        assert text.startswith(words)
    trainer.max_length = 1
    assert len(trainer.generate_from_model(trainer.model, batch)) == len(prompts)


def test_the_mode_of_the_model_survives_completions(make, tmp_path):
    trainer = make(eval_dataset=pairs(4, seed=5), config={"generate_during_eval": True})
    loader = trainer.get_eval_dataloader()
    for training in (True, False):
        trainer.model.train(training)
        trainer._log_completions(loader, "eval")
        assert trainer.model.training is training
    (file,) = (tmp_path / "completions").iterdir()
    assert len(file.read_text().splitlines()) == 3  # a batch of evaluation


def test_datasets_that_come_later_are_prepared(make, log):
    rows = pairs(6, seed=5)  # two whole batches
    trainer = make(eval_dataset=rows, config={"eval_strategy": "steps", "eval_steps": 1})
    expected = trainer.evaluate()
    names = [name for name in expected if name.startswith(("eval_loss", "eval_rew", "eval_logp"))]
    for given in (rows, trainer.eval_dataset, rows.to_iterable_dataset()):
        found = trainer.evaluate(given)
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    several = trainer.evaluate({"a": rows, "b": rows})
    assert several["eval_a_loss"] == several["eval_b_loss"] == expected["eval_loss"]
    assert trainer.predict(rows).metrics["test_loss"] == expected["eval_loss"]


def test_datasets_that_come_later_are_checked(make, log):
    trainer = make()
    with pytest.raises(ValueError, match="eval_dataset has no column rejected"):
        trainer.evaluate(pairs(2).remove_columns("rejected"))
    with pytest.raises(TypeError, match="test_dataset is a DatasetDict with the splits a; pass"):
        trainer.predict(DatasetDict(a=pairs(2)))
    same = Dataset.from_list([{"prompt": "Is it? ", "chosen": "Yes.", "rejected": "Yes."}] * 2)
    trainer.predict(same)
    assert "test_dataset: 2 of 2 rows have the same chosen and rejected" in log.text


def test_datasets_with_images_that_come_later(make, log):
    pytest.importorskip("PIL", reason="rows with images need Pillow")
    from support.image_models import image_model, image_pairs

    model, processor = image_model("llava")
    rows, other = image_pairs(6), image_pairs(6, seed=9)
    given = {"model": model, "processing_class": processor}
    trainer = make(**given, train_dataset=rows, eval_dataset=other)
    expected = trainer.evaluate()["eval_loss"]
    named = other.rename_column("prompt", "question")
    for each in (other, trainer.eval_dataset, named, other.to_iterable_dataset()):
        assert trainer.evaluate(each)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(named).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="eval_dataset has no column rejected"):
        trainer.evaluate(other.remove_columns("rejected"))
    text = make(**given, train_dataset=rows.remove_columns("images"))
    with pytest.raises(ValueError, match="eval_dataset has images and the data that the trainer"):
        text.evaluate(other)


def test_rows_that_came_later_follow_the_arguments(make):
    rows = long_pairs(6)
    trainer = make()
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.args.max_length = 20
    after = trainer.evaluate(rows)["eval_loss"]
    assert after != before
    assert after == make(config={"max_length": 20}).evaluate(rows)["eval_loss"]
