"""Every engine that spreads a run over processes, with every feature: as one process, or refused.

Two processes run all cells of some engines one after the other; run as a script this file is what
they run. One process takes the batches of both, one after the other.
"""

import copy
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from oddsmith import NF4Config, ORPOConfig, ORPOTrainer
from support.engines import ENGINES, Engine, under, whole_weights
from support.processes import end, two_processes
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs, train_logs

STEPS, SAVED = 4, 2


@dataclass(frozen=True)
class Feature:
    """What a cell trains: a model, how it is loaded, an adapter, arguments."""

    model: str = "mistral"
    nf4: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    evaluates: bool = False


_LORA = {"r": 4, "target_modules": "all-linear"}
FEATURES: dict[str, Feature] = {
    "full": Feature(),
    "LoRA": Feature(lora=_LORA),
    "NF4 + LoRA": Feature(nf4={}, lora=_LORA),
    "NF4 in float32 + LoRA": Feature(nf4={"storage": torch.float32}, lora=_LORA),
    "checkpointing": Feature(arguments={"gradient_checkpointing": True}),
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
    return ORPOTrainer(
        AutoModelForCausalLM.from_pretrained(models / feature.model, dtype="float32", **load),
        args,
        train_dataset=pairs(12),
        eval_dataset=pairs(5, seed=8) if feature.evaluates else None,
        processing_class=make_tokenizer(),
        peft_config=adapter,
    )


def run(engine: Engine, feature: Feature, models: Path, out: Path, **changed: Any) -> dict:
    """What a cell gives: its losses and weights, before and after, and those of a resumed run."""
    trainer = make_trainer(engine, feature, models, out, **changed)
    before = whole_weights(trainer.model)
    trainer.train()
    result = {
        "before": before,
        "weights": whole_weights(trainer.model),
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


def main(models: str, folder: str, *engines: str) -> None:
    for name in engines:
        for cell, feature in FEATURES.items():
            out = Path(folder) / name / cell
            with under(ENGINES[name]) as engine:
                try:
                    result = run(engine, feature, Path(models), out)
                except Exception as error:
                    traceback.print_exc()
                    result = {"error": f"{type(error).__name__}: {error}"}
            if os.environ["RANK"] == "0":
                out.mkdir(parents=True, exist_ok=True)
                torch.save(result, out / "result.pt")


# ---- Two processes against one ----

# Engines of one launch, which imports everything once.
LAUNCHES = [
    ["DDP", "FSDP2 by arguments", "FSDP2 by environment", "FSDP2 by DistributedConfig"],
]
# (engine, feature) -> what is refused, in the words of the error; for all engines of a kind.
REFUSED: dict[tuple[str, str], str] = {}
# No reduction takes another order.
TO_THE_BIT = ("DDP",)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module", params=LAUNCHES, ids=" and ".join)
def launch(request, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, models, folder, *request.param, timeout=900)
    return folder


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    @cache
    def of_feature(cell: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("one")
        return run(Engine(), FEATURES[cell], models, folder, gradient_accumulation_steps=2)

    return of_feature


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("cell", FEATURES)
def test_a_feature(cell, launch, alone):
    problems = []
    for folder in sorted(launch.iterdir()):
        found = torch.load(folder / cell / "result.pt")
        refusal = REFUSED.get((folder.name, cell))
        if refusal is not None:
            assert refusal in found.get("error", "it ran"), folder.name
        else:
            problems += [
                f"{folder.name}: {each}" for each in differences(folder.name, found, alone(cell))
            ]
    assert not problems


def differences(engine: str, found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    if "error" in found:
        yield found["error"]
        return
    room = 0.0 if engine in TO_THE_BIT else 1e-4
    for mine, other in zip(found["losses"], expected["losses"], strict=True):
        if abs(mine - other) > room:
            yield f"loss {mine} for {other}"
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in found["weights"].items():
        if torch.equal(weight, found["before"][name]):
            yield f"{name} has not moved"
        if (error := (weight - expected["weights"][name]).abs().max().item()) > room:
            yield f"{name} is {error:.1e} off"
        if "resumed" in found and not torch.equal(weight, found["resumed"][name]):
            yield f"{name} differs in a resumed run"
    if found["path"] != expected["path"]:
        yield found["path"]


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
