"""Every engine that spreads a run over processes, with every feature: as one process, or refused.

Two processes run all cells of some engines one after the other; run as a script this file is what
they run. One process takes the batches of both, one after the other. The processes of tensor
parallelism share each layer, so they train on the rows of one process.
"""

import sys
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from accelerate import ParallelismConfig

from support.engine_launch import problems, run_cells
from support.engine_table import BY_TENSORS, FSDP_AND_DDP
from support.processes import end, two_processes

ENGINES = {**FSDP_AND_DDP, **BY_TENSORS}


def main(models: str, folder: str) -> None:
    # Should one process fail alone, the other does not wait for long.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    # accelerate refuses meshes of CPUs.
    with patch.object(ParallelismConfig, "_validate_accelerator"):
        for name, row in ENGINES.items():
            run_cells(row, models, Path(folder) / name)


# ---- Two processes against one ----


@pytest.fixture(scope="module")
def launch(engine_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, engine_models, folder, timeout=900)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("cell", {cell: None for row in ENGINES.values() for cell in row.cells})
def test_a_feature(cell, launch, alone):
    rows = {name: row for name, row in ENGINES.items() if cell in row.cells}
    found = [problems(name, row, cell, launch / name, alone) for name, row in rows.items()]
    assert not [line for lines in found for line in lines]


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
