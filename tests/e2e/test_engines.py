"""Every engine that spreads a run over processes, with every feature: as one process, or refused.

Two processes run all cells of some engines one after the other; run as a script this file is what
they run. One process takes the batches of both, one after the other.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from support.engine_cells import CELLS, REFUSED, ROUNDED, TO_THE_BIT, differences
from support.engine_runs import run, save_models
from support.engines import ENGINES, Engine, under
from support.processes import end, one_thread, two_processes


def main(models: str, folder: str, *engines: str) -> None:
    # Should one process fail alone, the other does not wait for long.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in engines:
        for cell, feature in CELLS.items():
            if os.environ.get("ODDSMITH_CELLS", cell) not in cell:  # to try a few
                continue
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
        with one_thread():
            return run(Engine(), CELLS[cell], models, folder, gradient_accumulation_steps=2)

    return of_feature


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_a_feature(cell, launch, alone):
    problems = []
    for folder in sorted(launch.iterdir()):
        found = torch.load(folder / cell / "result.pt")
        refusal = REFUSED.get((folder.name, cell))
        if refusal is not None:
            assert refusal in found.get("error", "it ran"), folder.name
            continue
        rounded = ROUNDED.get(cell) if folder.name not in TO_THE_BIT else None
        each = [*differences(folder.name, found, alone(cell), rounded)]
        each += unsaved(folder / cell / "saved", found)
        problems += [f"{folder.name}: {line}" for line in each]
    assert not problems


def unsaved(folder: Path, found: dict[str, Any]) -> Iterator[str]:
    """Which trained weights are not those in the files that were saved."""
    if "error" in found:
        return
    saved = {
        name: each
        for file in folder.glob("*.safetensors")
        for name, each in load_file(file).items()
    }
    for name, weight in found["weights"].items():
        each = saved.get(name.replace(".default.", "."))
        if each is None or not torch.equal(each.to(weight.dtype), weight):
            yield f"{name} was not saved"


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
