"""One process with two GPUs: transformers splits batches by DataParallel, and the numbers stay."""

import pytest
from peft import LoraConfig

from oddsmith import ORPOConfig, ORPOTrainer
from support.data_parallel import SplitInTwo, two_gpus
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs, train_logs

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def run(tmp_path, name, batch, lora=None, **changed):
    """Losses, metrics and weights of a run with so many pairs for each GPU."""
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    tokenizer = make_tokenizer(name)
    trainer = ORPOTrainer(
        make_model(name, tokenizer),
        ORPOConfig(**arguments(tmp_path, **sizes, **changed)),
        train_dataset=pairs(12),
        eval_dataset=pairs(5, seed=8),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    metrics = {**trainer.evaluate(), **train_logs(trainer)[0]}
    numbers = {
        name: value
        for name, value in metrics.items()
        if not any(part in name for part in ("runtime", "second", "preparation"))
    }
    return trainer, [log["loss"] for log in train_logs(trainer)], numbers


@pytest.mark.parametrize(
    "name, lora, changed",
    [
        ("mistral", None, {}),
        ("mistral", LORA, {"gradient_checkpointing": True}),
        ("mistral", None, {"max_tokens_per_batch": 300}),
        ("t5", None, {}),
    ],
    ids=["full", "LoRA", "max_tokens_per_batch", "t5"],
)
def test_two_gpus_are_one(name, lora, changed, tmp_path, monkeypatch):
    forward, calls = SplitInTwo.forward, []
    monkeypatch.setattr(
        SplitInTwo,
        "forward",
        lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1],
    )
    one, losses, metrics = run(tmp_path / "one", name, 2, lora, **changed)
    with two_gpus():
        two, others, found = run(tmp_path / "two", name, 1, lora, **changed)
    assert calls and "from logits" in str(two.path)
    assert not two.data_collator.packing
    assert others == pytest.approx(losses, abs=1e-5)
    assert found == pytest.approx(metrics, abs=1e-4)
    for key, weight in one.model.named_parameters():
        assert (dict(two.model.named_parameters())[key] - weight).abs().max() < 1e-5, key
