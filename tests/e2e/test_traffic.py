"""What two processes send in a step is what the formulas of docs/distributed.md say, to the byte.

Run as a script this file is what the processes run.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig

from support import traffic
from support.counted_traffic import counted
from support.engine_cells import CELLS
from support.engine_runs import LORA, make_trainer
from support.engines import ENGINES, under
from support.processes import end, report, reports, two_processes

STEPS = 2
RANK = LORA["r"]
# Engine, cell and micro-batches of a step -> the traffic by formula.
CASES = {
    ("DDP", "full", 1): lambda shape: traffic.ddp(shape.parameters),
    ("DDP", "LoRA", 2): lambda shape: traffic.ddp(shape.adapter(RANK)),
    ("FSDP2 by arguments", "full", 2): lambda shape: traffic.fsdp2(shape, size=4),
    ("FSDP2 by arguments", "checkpointing", 1): lambda shape: traffic.fsdp2(shape, size=4),
    ("FSDP2 by arguments", "full in bfloat16", 1): traffic.fsdp2,
    ("FSDP2 by arguments", "LoRA", 1): lambda shape: traffic.fsdp2(shape, RANK, size=4),
    ("FSDP2 by arguments", "NF4 in bfloat16 + LoRA", 2): lambda shape: traffic.fsdp2_nf4(
        shape, RANK
    ),
    ("FSDP2 by arguments", "NF4 + LoRA", 1): lambda shape: traffic.fsdp2_nf4(
        shape, RANK, size=4, codes_split=False
    ),
}


def main(models, folder):
    found = []
    for number, (name, cell, micro_batches) in enumerate(CASES):
        counts = Counter()
        options = {"max_steps": STEPS, "gradient_accumulation_steps": micro_batches}
        out = Path(folder) / str(number)
        with under(ENGINES[name]), counted(counts) as count:
            trainer = make_trainer(
                ENGINES[name], CELLS[cell], Path(models), out, save_strategy="no", **options
            )
            count(trainer)
            trainer.train()
        found.append(counts)
    report(folder, found)


@pytest.fixture(scope="module")
def shape(engine_models):
    return traffic.shape_of(AutoConfig.from_pretrained(engine_models / "mistral"))


def test_two_processes(engine_models, shape, tmp_path):
    two_processes(__file__, engine_models, tmp_path)
    for found in reports(tmp_path):
        for (case, formula), counts in zip(CASES.items(), found, strict=True):
            *_, micro_batches = case
            each = formula(shape)
            expected = {
                "reduced": STEPS * each.reduced,
                "gathered": STEPS * micro_batches * each.gathered,
                "scattered": STEPS * each.scattered,
            }
            assert counts == {name: size for name, size in expected.items() if size}, case


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
