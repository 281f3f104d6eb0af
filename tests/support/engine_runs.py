"""Runs of the trainer that a table of engines and features has: one for each cell."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from oddsmith import NF4Config, ORPOConfig, ORPOTrainer

from .engines import Engine, apart, whole_weights
from .trainer_runs import arguments, make_model, make_tokenizer, pairs, train_logs

STEPS, SAVED = 4, 2


@dataclass(frozen=True)
class Feature:
    """What a cell trains: a model, how it is loaded, an adapter, arguments."""

    model: str = "mistral"
    dtype: str = "float32"
    nf4: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    evaluates: bool = False
    upcast: bool = False  # to float32, after it was loaded


LORA = {"r": 4, "target_modules": "all-linear"}
FEATURES: dict[str, Feature] = {
    "full": Feature(),
    "LoRA": Feature(lora=LORA),
    "NF4 + LoRA": Feature(nf4={}, lora=LORA),
    "NF4 in float32 + LoRA": Feature(nf4={"bnb_4bit_quant_storage": torch.float32}, lora=LORA),
    # Where the budget has an effect, none, one or two of the two layers are recomputed, not always
    # as many in both processes: by default none is after the first step.
    "checkpointing": Feature(
        arguments={"gradient_checkpointing": True, "activation_budget": 300_000}
    ),
    "tied": Feature(model="qwen3_tied"),
    "max_tokens_per_batch": Feature(arguments={"max_tokens_per_batch": 200}),
    "uneven evaluation": Feature(evaluates=True),
    "adamw_8bit": Feature(arguments={"optim": "adamw_8bit"}),
    "paged_adamw_32bit": Feature(arguments={"optim": "paged_adamw_32bit"}),
    "galore_adamw": Feature(
        arguments={
            "optim": "galore_adamw",
            "optim_target_modules": [r".*attn.*", r".*mlp.*"],
            "optim_args": "rank=6,update_proj_gap=3",
        }
    ),
}


def save_models(folder: Path) -> None:
    tokenizer = make_tokenizer()
    for name in {feature.model for feature in FEATURES.values()}:
        make_model(name, tokenizer).save_pretrained(folder / name)


def make_trainer(engine: Engine, feature: Feature, models: Path, out: Path, **changed: Any) -> Any:
    """A trainer whose two processes, or two micro-batches of one, have one pair each."""
    config = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-6,
        "lr_scheduler_type": "linear",
        "save_strategy": "no" if engine.distributed else "steps",
        "save_steps": SAVED,
        **feature.arguments,
        **engine.arguments,
        **changed,
    }
    args = ORPOConfig(**arguments(out, **copy.deepcopy(config)))
    load: dict[str, Any] = {}
    if engine.distributed is not None:
        from transformers.distributed import DistributedConfig

        load["distributed_config"] = DistributedConfig(**engine.distributed)
    if feature.nf4 is not None:
        load["quantization_config"] = NF4Config(**feature.nf4)
    adapter = None
    if feature.lora is not None:
        from peft import LoraConfig

        adapter = LoraConfig(**feature.lora, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(
        models / feature.model, dtype=feature.dtype, **load
    )
    if feature.upcast:
        torch.nn.Module.float(model)  # transformers' own refuses 4-bit models
    return ORPOTrainer(
        model,
        args,
        train_dataset=pairs(12),
        eval_dataset=pairs(5, seed=8) if feature.evaluates else None,
        processing_class=make_tokenizer(),
        peft_config=adapter,
    )


def run(
    engine: Engine,
    feature: Feature,
    models: Path,
    out: Path,
    start: Mapping[str, torch.Tensor] | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """
    What a cell gives: its losses and weights, before and after, and those of a resumed run.

    Args:
        engine (`Engine`): How a run is spread.
        feature (`Feature`): What it trains.
        models (`Path`): Folder of the models.
        out (`Path`): Its own folder.
        start (`Mapping`, *optional*): Values of the trained weights to begin with.
        changed: Arguments of `ORPOConfig` that are changed.
    """
    trainer = make_trainer(engine, feature, models, out, **changed)
    if start is not None:
        trainer.model.load_state_dict(start, strict=False)
    before = whole_weights(trainer.model)
    trainer.train()
    result = {
        "before": before,
        "weights": whole_weights(trainer.model),
        "apart": apart(trainer.model),
        "dtypes": {name: each.dtype for name, each in trainer.model.named_parameters()},
        "losses": [log["loss"] for log in train_logs(trainer)],
        "path": str(trainer.path),
    }
    if feature.evaluates:
        result["metrics"] = trainer.evaluate()
    trainer.save_model(str(out / "saved"))
    if trainer.args.save_strategy != "no":
        resumed = make_trainer(engine, feature, models, out / "resumed", **changed)
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{SAVED}"))
        result["resumed"] = whole_weights(resumed.model)
    return result
