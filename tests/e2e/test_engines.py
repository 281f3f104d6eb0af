"""Every engine that spreads a run over processes, with every feature: as one process, or refused.

Two processes run all cells of some engines one after the other; run as a script this file is what
they run. One process takes the batches of both, one after the other.
"""

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from support.engine_cells import CELLS, REFUSED, differences
from support.engine_launch import result_of, run_cells
from support.engines import ENGINES
from support.processes import end, two_processes


def main(models: str, folder: str) -> None:
    # Should one process fail alone, the other does not wait for long.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, engine in ENGINES.items():
        run_cells(engine, CELLS, models, Path(folder) / name)


# ---- Two processes against one ----


@pytest.fixture(scope="module")
def launch(engine_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, engine_models, folder, timeout=900)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_a_feature(cell, launch, alone):
    problems = []
    for name in ENGINES:
        found = result_of(launch / name, cell)
        refusal = REFUSED.get((name, cell))
        if refusal is not None:
            assert refusal in found.get("error", "it ran"), name
            continue
        each = [*differences(name, found, alone(cell))]
        each += unsaved(launch / name / cell / "saved", found)
        problems += [f"{name}: {line}" for line in each]
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
