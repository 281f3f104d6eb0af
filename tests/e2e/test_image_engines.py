"""Images on some processes only, under engines that gather the vision part from all: two processes are
one. They run this file as a script.
"""

import copy
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset

pytest.importorskip("PIL", reason="rows with images need Pillow")

from oddsmith import ORPOConfig, ORPOTrainer
from support.deepspeed_on_cpu import allow_cpus, end_deepspeed, zero
from support.engines import ENGINES, Engine, under, whole_weights
from support.image_models import image_model, image_pairs, picture
from support.processes import end, one_thread, two_processes
from support.trainer_runs import arguments, train_logs

_BY_LAYERS = ENGINES["FSDP2 by arguments"].arguments["fsdp_config"]
# accelerate does not find all classes that the default names.
_LAYERS = {
    "gemma3": ["Gemma3DecoderLayer", "SiglipEncoderLayer"],
    "llava": ["LlamaDecoderLayer", "CLIPEncoderLayer"],
}
ZERO3 = Engine(zero(3))
MODELS = ("qwen2_5_vl", "gemma3", "llava")
# Images of each row; without a shuffle process 0 has the even ones. The last step has none at all.
COUNTS = (1, 0, 0, 2, 1, 1, 0, 0)
STEPS = 2  # of two micro-batches


def rows():
    made = image_pairs(len(COUNTS))
    columns = {name: made[name][:] for name in ("prompt", "chosen", "rejected")}
    images = [[picture(9 * i + j) for j in range(count)] for i, count in enumerate(COUNTS)]
    return Dataset.from_dict({**columns, "images": images})


class Plain(ORPOTrainer):
    """From logits, through a hook."""

    def odds_ratio_loss(self, policy_chosen_logps, policy_rejected_logps):
        return super().odds_ratio_loss(policy_chosen_logps, policy_rejected_logps)


CASES = [*((name, ORPOTrainer) for name in MODELS), ("gemma3", Plain)]


def fsdp2(name):
    layers = {"transformer_layer_cls_to_wrap": _LAYERS[name]} if name in _LAYERS else {}
    return Engine({"fsdp": True, "fsdp_config": {**_BY_LAYERS, **layers}})


def run(engine, name, kind, out, **changed):
    model, processor = image_model(name)
    options = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential", "adam_epsilon": 1e-6, "max_length": 256,
        **engine.arguments, **changed,
    }  # fmt: skip
    args = ORPOConfig(**arguments(out, **copy.deepcopy(options)))
    trainer = kind(
        model, args, train_dataset=rows(), eval_dataset=rows().select(range(5)),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    return {
        "losses": [log["loss"] for log in train_logs(trainer)],
        "eval": trainer.evaluate()["eval_logps/chosen"],
        "weights": whole_weights(trainer.model),
    }


def main(folder, which):
    if which == "deepspeed":
        allow_cpus()
    else:
        # Should one process wait for the other, it does not do so for long.
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, kind in CASES if which != "deepspeed" else CASES[:1]:
        engine = ZERO3 if which == "deepspeed" else fsdp2(name)
        with under(engine):
            found = run(engine, name, kind, Path(folder) / name)
            end_deepspeed()
        torch.save(found, Path(folder) / f"{name} {kind.__name__}.pt")


def check(folder, cases, out):
    for name, kind in cases:
        found = torch.load(folder / f"{name} {kind.__name__}.pt")
        with one_thread():
            alone = run(Engine(), name, kind, out, gradient_accumulation_steps=4)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
        assert found["eval"] == pytest.approx(alone["eval"], rel=1e-4), name
        for key, weight in alone["weights"].items():
            assert (found["weights"][key] - weight).abs().max() < 1e-4, (name, key)


def test_fsdp2(tmp_path):
    two_processes(__file__, tmp_path, "fsdp2", timeout=600)
    check(tmp_path, CASES, tmp_path / "alone")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3(tmp_path):
    two_processes(__file__, tmp_path, "deepspeed", timeout=600)
    check(tmp_path, CASES[:1], tmp_path / "alone")


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
