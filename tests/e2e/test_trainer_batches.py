"""Packed, shared and token-filled batches in complete runs."""

import random

import pytest
from datasets import Dataset

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.data.token_batches import pair_lengths
from support.trainer_runs import (
    arguments,
    make_model,
    make_tokenizer,
    pairs,
    random_words,
    train,
    train_logs,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model("mistral", tokenizer)


class Recorder(ORPOTrainer):
    """Records the tokens and pairs that went through the model."""

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        self.seen = getattr(self, "seen", [])
        packed = batch.packed()
        tokens = batch["chosen_input_ids"].numel() + batch["rejected_input_ids"].numel()
        self.seen.append(
            (tokens if packed is None else packed.input_ids.numel(), batch["chosen"], packed)
        )
        return super().get_batch_loss_metrics(model, batch, train_eval)


def run(model, tokenizer, folder, rows, **config):
    return train(Recorder, ORPOConfig, model, tokenizer, rows, arguments(folder, **config))


def long_prompts(count):
    draw = random.Random(2)
    lengths = {"prompt": 30, "chosen": 6, "rejected": 5}
    return Dataset.from_list(
        [{name: random_words(draw, n) + "\n" for name, n in lengths.items()} for _ in range(count)]
    )


def test_sharing_and_packing_change_nothing_but_the_work(model, tokenizer, tmp_path):
    rows, config = long_prompts(12), {"max_steps": 5, "max_length": 512}
    ways = {
        "shared": {"share_prompt": True},
        "auto": {},
        "packed": {"share_prompt": False},
        "padded": {"padding_free": False},
    }
    runs = {
        name: run(model, tokenizer, tmp_path, rows, **config, **way) for name, way in ways.items()
    }
    tokens = {name: sum(count for count, *_ in each.seen) for name, each in runs.items()}
    assert tokens["shared"] == tokens["auto"] < 0.7 * tokens["packed"] < 0.7 * tokens["padded"]
    truth = train_logs(runs["padded"])
    for name, each in runs.items():
        assert (each._padded_because is None) == (name != "padded")
        for mine, entry in zip(train_logs(each), truth, strict=True):
            for key in ("loss", "nll_loss", "grad_norm", "rewards/margins", "logits/rejected"):
                assert mine[key] == pytest.approx(entry[key], rel=2e-5, abs=1e-6), (name, key)


def test_batches_by_tokens(model, tokenizer, tmp_path):
    rows = pairs(23)
    config = {"max_steps": -1, "num_train_epochs": 2, "max_tokens_per_batch": 150}
    trainer = run(model, tokenizer, tmp_path, rows, gradient_accumulation_steps=1, **config)
    lengths = pair_lengths(trainer.train_dataset).sum(axis=1)
    by_text = dict(zip(trainer.train_dataset["chosen"], lengths))
    steps = trainer.state.max_steps
    assert len(trainer.seen) == steps and steps % 2 == 0
    for epoch in (trainer.seen[: steps // 2], trainer.seen[steps // 2 :]):
        assert sorted(text for _, texts, _ in epoch for text in texts) == sorted(rows["chosen"])
    for _, texts, _ in trainer.seen:
        assert len(texts) == 1 or sum(by_text[text] for text in texts) <= 150
    assert max(len(texts) for _, texts, _ in trainer.seen) > 1
    # Another order in the second epoch.
    firsts, seconds = ([texts[0] for _, texts, _ in trainer.seen[part::2]] for part in (0, 1))
    assert firsts != seconds


def test_batches_by_tokens_resume_from_a_checkpoint(model, tokenizer, tmp_path):
    config = {
        "max_tokens_per_batch": 150,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    whole = run(model, tokenizer, tmp_path, pairs(23), **config)
    args = ORPOConfig(**arguments(tmp_path, **config))
    again = Recorder(
        model=make_model("mistral", tokenizer),
        args=args,
        train_dataset=pairs(23),
        processing_class=tokenizer,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    ends = [[entry["loss"] for entry in train_logs(each)][-3:] for each in (whole, again)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_a_stream_has_no_lengths(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_batch is 99 and train_dataset a Iterable"):
        stream = pairs(8).to_iterable_dataset()
        run(model, tokenizer, tmp_path, stream, max_tokens_per_batch=99)


def test_grouped_by_length(model, tokenizer, tmp_path):
    rows = pairs(24)
    strategy = {"train_sampling_strategy": "group_by_length"}
    config = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 1, **strategy}
    trainer = run(model, tokenizer, tmp_path, rows, **config)
    assert sorted(text for _, texts, _ in trainer.seen for text in texts) == sorted(rows["chosen"])
    plain = run(model, tokenizer, tmp_path, rows, max_steps=-1, num_train_epochs=1)

    def spread(each):
        lengths = pair_lengths(each.train_dataset).sum(axis=1)
        by_text = dict(zip(each.train_dataset["chosen"], lengths))
        sizes = [[by_text[text] for text in texts] for _, texts, _ in each.seen]
        return sum(max(batch) - min(batch) for batch in sizes)

    assert spread(trainer) < 0.5 * spread(plain)


def test_a_batch_that_a_hook_has_changed(model, tokenizer, tmp_path):
    """The collator's packed rows are not used if the batch was changed."""

    class Masking(ORPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["chosen_labels"][:, -2:] = -100
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows, args = pairs(12), arguments(tmp_path)
    logs = [
        train_logs(train(kind, ORPOConfig, model, tokenizer, rows, {**args, **way}))
        for kind, way in ((Masking, {}), (Masking, {"padding_free": False}), (ORPOTrainer, {}))
    ]
    for packed, padded, unchanged in zip(*logs, strict=True):
        assert packed["logps/chosen"] == pytest.approx(padded["logps/chosen"], rel=1e-5)
        assert packed["logps/chosen"] != pytest.approx(unchanged["logps/chosen"], rel=1e-4)
