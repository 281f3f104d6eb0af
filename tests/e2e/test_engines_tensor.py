"""Tensor parallelism with every feature: as one process, or refused.

Two processes share each layer, so they train on the rows of one process. Run as a script this file is
what they run.
"""

import os
import sys
import traceback
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import ParallelismConfig

from support.engine_cells import IN_32_BITS, ROUNDED, differences
from support.engine_runs import FEATURES, Feature, run, save_models
from support.engines import Engine, under
from support.processes import end, one_thread, two_processes

TENSOR = Engine(distributed={"tp_size": 2})
ADAPTER, CHECKPOINTS = "LoRA on layers whose rows are split", "checkpoints"
_ROWS = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}
CELLS = {
    # 4-bit models are refused in test_engines.py, whatever distributed_config has split them for.
    **{name: cell for name, cell in {**FEATURES, **IN_32_BITS}.items() if cell.nf4 is None},
    ADAPTER: Feature(lora=_ROWS),
    CHECKPOINTS: Feature(),
}
REFUSED = {
    "galore_adamw": "ValueError: optim is 'galore_adamw' with tensor parallelism",
    "LoRA": "ValueError: tensor parallelism splits the columns of base_model.model.model.layers.0.",
    # By transformers.
    CHECKPOINTS: "ValueError: Resuming is not supported for models sharded at load time",
}


def main(models: str, folder: str, *cells: str) -> None:
    for cell in cells or CELLS:
        out = Path(folder) / cell
        changed = {"save_strategy": "steps"} if cell == CHECKPOINTS else {}
        # accelerate refuses meshes of CPUs.
        with under(TENSOR), patch.object(ParallelismConfig, "_validate_accelerator"):
            try:
                result = run(TENSOR, CELLS[cell], Path(models), out, **changed)
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
        if os.environ["RANK"] == "0":
            out.mkdir(parents=True, exist_ok=True)
            torch.save(result, out / "result.pt")


# ---- Two processes against one ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def launch(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, models, folder, timeout=900)
    return folder


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    @cache
    def of_feature(cell):
        with one_thread():
            return run(Engine(), CELLS[cell], models, tmp_path_factory.mktemp("one"))

    return of_feature


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_a_feature(cell, launch, alone):
    found = torch.load(launch / cell / "result.pt")
    if cell in REFUSED:
        assert REFUSED[cell] in found.get("error", "it ran")
        return
    expected = alone(cell)
    assert "error" not in found, found["error"]
    assert "its output head is split by tensor parallelism" in found.pop("path")
    if cell == ADAPTER:
        check_adapter(found, expected)
    else:
        found["path"] = expected["path"]
        rounded = ROUNDED.get(cell)
        assert not list(differences("tensor parallelism", found, expected, rounded))


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
