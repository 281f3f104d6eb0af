"""Tensor parallelism with every feature: as one process, or refused.

Two processes share each layer, so they train on the rows of one process. Run as a script this file is
what they run.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import ParallelismConfig

from support.engine_cells import CHECKPOINTS, EVERY, IN_32_BITS, LORA_ON_ROWS, differences
from support.engine_launch import result_of, run_cells
from support.engine_runs import FEATURES
from support.engines import Engine
from support.processes import end, two_processes

TENSOR = Engine(distributed={"tp_size": 2})
# 4-bit models are refused in test_engines.py, whatever distributed_config has split them for.
CELLS = [
    *(cell for cell in (*FEATURES, *IN_32_BITS) if EVERY[cell].nf4 is None),
    LORA_ON_ROWS,
    CHECKPOINTS,
]
REFUSED = {
    "galore_adamw": "ValueError: optim is 'galore_adamw' with tensor parallelism",
    "LoRA": "ValueError: tensor parallelism splits the columns of base_model.model.model.layers.0.",
    # By transformers.
    CHECKPOINTS: "ValueError: Resuming is not supported for models sharded at load time",
}


def main(models: str, folder: str) -> None:
    # accelerate refuses meshes of CPUs.
    with patch.object(ParallelismConfig, "_validate_accelerator"):
        run_cells(TENSOR, CELLS, models, Path(folder))


# ---- Two processes against one ----


@pytest.fixture(scope="module")
def launch(engine_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, engine_models, folder, timeout=900)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_a_feature(cell, launch, alone):
    found = result_of(launch, cell)
    if cell in REFUSED:
        assert REFUSED[cell] in found.get("error", "it ran")
        return
    expected = alone(cell, micro_batches=1)
    assert "error" not in found, found["error"]
    assert "its output head is split by tensor parallelism" in found.pop("path")
    if cell == LORA_ON_ROWS:
        check_adapter(found, expected)
    else:
        found["path"] = expected["path"]
        assert not list(differences("tensor parallelism", found, expected))


def check_adapter(found, expected):
    """
    peft draws other numbers for a half of a layer, but an adapter has no effect before the first
    step, and the learning rate is zero in that.
    """
    assert found["losses"][:2] == pytest.approx(expected["losses"][:2], abs=1e-4)
    assert found["losses"][2:] == pytest.approx(expected["losses"][2:], abs=0.2)
    for name, weight in found["weights"].items():
        assert not torch.equal(weight, found["before"][name]), name


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
