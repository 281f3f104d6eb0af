"""One process with two GPUs: transformers splits batches by DataParallel, and the numbers stay."""

import pytest
from peft import LoraConfig

from oddsmith import ORPOConfig, ORPOTrainer
from support.data_parallel import SplitInTwo, two_gpus
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs, train_logs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def trainer_for(tmp_path, name, batch, lora=None, **changed):
    """A trainer with so many pairs for each GPU."""
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    tokenizer = make_tokenizer(name)
    return ORPOTrainer(
        make_model(name, tokenizer),
        ORPOConfig(**arguments(tmp_path, max_steps=2, **sizes, **changed)),
        train_dataset=pairs(8),
        eval_dataset=pairs(3, seed=8),
        processing_class=tokenizer,
        peft_config=lora,
    )


def run(trainer):
    """Losses and metrics of a run."""
    trainer.train()
    logs = train_logs(trainer)
    numbers = {
        **trainer.evaluate(),
        **logs[0],
        **{f"loss_{i}": log["loss"] for i, log in enumerate(logs)},
    }
    times = ("runtime", "second", "preparation")
    return {name: each for name, each in numbers.items() if not any(part in name for part in times)}


@pytest.mark.parametrize("name, lora", [("mistral", LORA), ("t5", None)])
def test_two_gpus_are_one(name, lora, tmp_path, monkeypatch):
    calls, copies = [], SplitInTwo._copies
    monkeypatch.setattr(SplitInTwo, "_copies", lambda self: calls.append(self) or copies(self))
    one = trainer_for(tmp_path / "one", name, 2, lora, gradient_checkpointing=lora is not None)
    expected = run(one)
    with two_gpus():
        two = trainer_for(tmp_path / "two", name, 1, lora, gradient_checkpointing=lora is not None)
        found = run(two)
    assert calls and "from logits" in str(two.path) and not two.data_collator.packing
    assert found == pytest.approx(expected, abs=1e-4)
    weights = dict(two.model.named_parameters())
    for key, weight in one.model.named_parameters():
        assert (weights[key] - weight).abs().max() < 1e-5, key


def test_a_quantised_model_stays_on_one_gpu(tmp_path):
    """transformers gives it the batches of both."""
    with two_gpus():
        trainer = trainer_for(tmp_path, "mistral", 1)
        assert trainer.path.head == "plain" and isinstance(
            trainer._wrap_model(trainer.model), SplitInTwo
        )
        trainer.model.is_loaded_in_4bit = True
        trainer._choose_path(trainer.model)
        trainer._announce_path()
        assert trainer.path.head == "fused" and trainer.data_collator.packing
        assert trainer._wrap_model(trainer.model) is trainer.model


def test_router_logits_are_refused(tmp_path):
    with (
        two_gpus(),
        pytest.raises(ValueError, match="cannot join the router logits of 2 GPUs; start"),
    ):
        trainer_for(tmp_path, "mixtral", 1)
