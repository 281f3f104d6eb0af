"""Complete runs of ORPOTrainer: logs, evaluation, saving, resuming, other data and models."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from oddsmith import ORPOConfig, ORPOTrainer
from support.trainer_runs import (
    arguments,
    make_model,
    make_tokenizer,
    pairs,
    train,
    train_logs,
)

# PEFT reads a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model("mistral", tokenizer)


@pytest.fixture
def run(model, tokenizer, tmp_path):
    """A trained trainer; `config` changes the arguments."""

    def run(rows=None, kind=ORPOTrainer, config=None, **kwargs):
        args = {**arguments(tmp_path), **(config or {})}
        rows = pairs(16) if rows is None else rows
        return train(kind, ORPOConfig, model, tokenizer, rows, args, **kwargs)

    return run


def eval_logs(trainer):
    return [
        entry for entry in trainer.state.log_history if any(k.startswith("eval_") for k in entry)
    ]


def test_training_learns_the_preference(run):
    config = {"max_steps": 40, "learning_rate": 5e-3, "logging_steps": 5}
    trainer = run(pairs(8), config=config)
    first, *_, last = train_logs(trainer)
    assert last["loss"] < 0.7 * first["loss"]
    assert last["rewards/accuracies"] == 1.0 and last["rewards/margins"] > first["rewards/margins"]


def test_logs_average_over_micro_batches(run, model):
    """One log of two steps of two micro-batches: the mean of the four, computed one by one."""

    class Recorder(ORPOTrainer):
        seen = []

        def store_metrics(self, metrics, train_eval="train"):
            self.seen.append({name: float(value) for name, value in metrics.items()})
            super().store_metrics(metrics, train_eval)

    Recorder.seen = []
    trainer = run(kind=Recorder, config={"max_steps": 2, "logging_steps": 2})
    (entry,) = train_logs(trainer)
    assert len(Recorder.seen) == 4 and METRICS < set(entry)
    for name in METRICS:
        mean = sum(each[name] for each in Recorder.seen) / 4
        assert entry[name] == pytest.approx(mean, rel=1e-6, abs=1e-9)
    assert "empty_completions" not in entry and "beta" not in entry
    assert entry["loss"] == pytest.approx(
        entry["nll_loss"] - 0.3 * entry["log_odds_ratio"], rel=1e-5
    )


def test_metrics_have_the_names_of_evaluation_sets(run):
    sets = {"easy": pairs(4, seed=5), "hard": pairs(5, seed=6)}
    trainer = run(config={"eval_strategy": "steps", "eval_steps": 3}, eval_dataset=sets)
    names = {name for entry in eval_logs(trainer) for name in entry}
    for key in sets:
        assert {f"eval_{key}_{name}" for name in METRICS} < names
    assert not {f"eval_{name}" for name in METRICS} & names
    metrics = trainer.evaluate()
    assert metrics["eval_easy_logps/chosen"] != metrics["eval_hard_logps/chosen"]
    assert metrics == {
        **metrics,
        **{k: v for k, v in eval_logs(trainer)[-1].items() if "logps" in k},
    }


def test_predict_has_its_own_prefix(run):
    trainer = run(config={"max_steps": 1}, eval_dataset=pairs(4, seed=5))
    output = trainer.predict(trainer.eval_dataset)
    assert {f"test_{name}" for name in METRICS} < set(output.metrics)
    assert not any(name.startswith("eval_") for name in output.metrics)
    assert {f"eval_{name}" for name in METRICS} < set(trainer.evaluate())


def test_compute_metrics_gets_mean_logits(run):
    given = []

    def compute(prediction):
        given.append(prediction.predictions)
        return {"mine": 4.5}

    config = {"max_steps": 1, "per_device_eval_batch_size": 6}
    trainer = run(config=config, eval_dataset=pairs(6, seed=5), compute_metrics=compute)
    metrics = trainer.evaluate()
    assert metrics["eval_mine"] == 4.5
    # Of one batch; the metrics of several are means over all tokens.
    expected = [metrics[f"eval_logits/{side}"] for side in ("chosen", "rejected")]
    assert list(given[0]) == pytest.approx(expected)


def test_best_model_by_a_preference_metric(run, tmp_path):
    config = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/accuracies",
    }
    trainer = run(config=config, eval_dataset=pairs(6, seed=5))
    logged = {e["step"]: e["eval_rewards/accuracies"] for e in eval_logs(trainer)}
    assert trainer.state.best_metric == max(logged.values())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert "2403.07691" in (tmp_path / "README.md").read_text()


def test_resuming_from_a_checkpoint(run, model, tokenizer, tmp_path):
    """The losses after the checkpoint, and beta's schedule, are those of an uninterrupted run."""
    config = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "beta_schedule": "cosine",
        "beta_end": 0.05,
        "num_train_epochs": 2,
    }
    whole = run(config=config)
    args = ORPOConfig(**arguments(tmp_path, **config))
    resumed = ORPOTrainer(
        copy.deepcopy(model), args, train_dataset=pairs(16), processing_class=tokenizer
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    later = [entry for entry in train_logs(whole) if entry["step"] > 3]
    again = [entry for entry in train_logs(resumed) if entry["step"] > 3]
    assert len(later) == 3
    for one, other in zip(later, again, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-8)


def test_saved_model_is_the_trained_one(run, tokenizer, tmp_path):
    trainer = run()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 9, 40, 77]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_tensorboard_events(run, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="reads the events")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    config = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 3}
    trainer = run(config=config, eval_dataset=pairs(4, seed=5))
    (file,) = (tmp_path / "events").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name in METRICS:
        train_points = events.Scalars(f"train/{name}")
        assert [point.step for point in train_points] == [1, 2, 3]
        logged = [entry[name] for entry in train_logs(trainer)]
        assert [point.value for point in train_points] == pytest.approx(logged, rel=1e-6)
        assert len(events.Scalars(f"eval/{name}")) == 1


def test_beta_schedule(run):
    config = {
        "max_steps": 4,
        "beta_schedule": "linear",
        "beta_end": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    trainer = run(config=config, eval_dataset=pairs(3, seed=5))
    entries = train_logs(trainer)
    # Steps done before each: 0, 1, 2, 3 of 4.
    assert [entry["beta"] for entry in entries] == pytest.approx([0.3, 0.25, 0.2, 0.15])
    for entry in entries:
        assert entry["rewards/chosen"] == pytest.approx(entry["beta"] * entry["logps/chosen"])
        expected = entry["nll_loss"] - entry["beta"] * entry["log_odds_ratio"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    (last,) = eval_logs(trainer)
    assert last["eval_rewards/chosen"] == pytest.approx(0.1 * last["eval_logps/chosen"])


def test_streams(run):
    stream = pairs(24).to_iterable_dataset()
    config = {"eval_strategy": "steps", "eval_steps": 3}
    trainer = run(stream, config=config, eval_dataset=pairs(5, seed=5).to_iterable_dataset())
    assert len(train_logs(trainer)) == 3
    assert METRICS < set(train_logs(trainer)[0])
    assert eval_logs(trainer)[0]["eval_logps/chosen"] < 0


def test_model_init(model, tokenizer, tmp_path):
    from peft import LoraConfig

    made = []

    def fresh():
        made.append(copy.deepcopy(model))
        return made[-1]

    args = ORPOConfig(**arguments(tmp_path))
    trainer = ORPOTrainer(
        args=args, train_dataset=pairs(16), processing_class=tokenizer, model_init=fresh
    )
    assert len(made) == 1 and trainer.model is made[0]
    trainer.train()
    assert trainer.model is made[-1] and trainer._plain_because is None
    expected = train(ORPOTrainer, ORPOConfig, model, tokenizer, pairs(16), arguments(tmp_path))
    for one, other in zip(train_logs(trainer), train_logs(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    trainer = ORPOTrainer(
        args=args,
        train_dataset=pairs(16),
        processing_class=tokenizer,
        model_init=fresh,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert any("lora" in name for name, _ in trainer.model.named_parameters())


def test_completions_of_an_evaluation(run, tmp_path, caplog):
    config = {
        "generate_during_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    sets = {"a": pairs(2, seed=5), "b": pairs(7, seed=6)}
    trainer = run(config=config, eval_dataset=sets)
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == ["eval_a_000003.jsonl", "eval_b_000003.jsonl"]
    rows = [json.loads(line) for line in files[1].read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3  # of a batch
    prompts = {row["prompt"] for row in sets["b"]}
    for row in rows:
        assert row["Prompt"] in prompts and not row["Policy"].startswith(row["Prompt"])
    assert "Completions at step 3" in caplog.text
    # Sampling has not changed the run.
    silent = run(config={**config, "generate_during_eval": False}, eval_dataset=sets)
    for one, other in zip(train_logs(trainer), train_logs(silent), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_completions_of_an_encoder_decoder(tmp_path):
    tokenizer = make_tokenizer("t5")
    model = make_model("t5", tokenizer)
    config = {"generate_during_eval": True, "eval_strategy": "steps", "eval_steps": 3}
    args = arguments(tmp_path, **config, max_completion_length=12)
    rows = {"eval_dataset": pairs(3, seed=5)}
    trainer = train(ORPOTrainer, ORPOConfig, model, tokenizer, pairs(12), args, **rows)
    assert (tmp_path / "completions" / "eval_000003.jsonl").exists()
    assert METRICS < set(train_logs(trainer)[0])


def test_empty_completions_are_counted(run):
    prompt = "ka lo mi " * 60
    empty = {"prompt": prompt, "chosen": "sun", "rejected": "dre"}
    rows = Dataset.from_list([*pairs(6).to_list(), empty, empty])
    trainer = run(rows, config={"max_steps": 2, "logging_steps": 2})
    (entry,) = train_logs(trainer)
    assert entry["empty_completions"] == 2
    assert all(math.isfinite(value) for value in entry.values())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class Break(TrainerCallback):
    """Makes the weights NaN before a step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))


@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_not_finite_is_logged_once(run, caplog, filtered):
    config = {"max_steps": 5, "logging_nan_inf_filter": filtered}
    trainer = run(config=config, callbacks=[Break()])
    told = [r.message for r in caplog.records if "NaN or infinite" in r.message]
    assert len(told) == 1 and "first at step 3" in told[0]
    losses = [entry["loss"] for entry in train_logs(trainer)]
    assert all(map(math.isfinite, losses[:2]))
    assert math.isfinite(losses[3]) == filtered


def test_mixed_precision_and_saving(run, tmp_path):
    """accelerate wraps the forward for autocast, and unwraps it to save."""
    config = {"bf16": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    half = run(config=config)
    assert half._plain_because is None
    exact = run(config={"max_steps": 4})
    for one, other in zip(train_logs(half), train_logs(exact), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
        assert one["loss"] != other["loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")


def test_two_trainers_on_one_model(model, tokenizer, tmp_path):
    """Both train, although the first has changed the forward."""
    shared = copy.deepcopy(model)
    logs = []
    for _ in range(2):
        args = ORPOConfig(**arguments(tmp_path, learning_rate=5e-3, bf16=True))
        trainer = ORPOTrainer(shared, args, train_dataset=pairs(8), processing_class=tokenizer)
        trainer.train()
        logs.append(train_logs(trainer))
    assert logs[1][-1]["loss"] < logs[0][0]["loss"]


def test_operations_are_counted(run, model):
    trainer = run(config={"max_steps": 1})
    assert trainer.state.total_flos > 0
    batch = {"chosen_input_ids": torch.zeros(2, 5), "rejected_input_ids": torch.zeros(2, 7)}
    weights = model.num_parameters(exclude_embeddings=True)
    assert trainer.floating_point_ops(batch) == 6 * 24 * weights
