"""The cells of an engine in two processes, and those of one process that they are compared with."""

import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .engine_cells import EVERY, LORA_ON_ROWS, TRUTHS
from .engine_differences import differences, unsaved
from .engine_runs import run
from .engine_table import Row
from .engines import Engine, under
from .processes import one_thread

__all__ = ["Alone", "problems", "run_cells"]


def run_cells(
    row: Row,
    models: str,
    folder: Path,
    after: Callable[[], None] = lambda: None,
) -> None:
    """
    What each of two processes runs: the cells of an engine, one after the other. [`problems`] looks at
    what they gave.

    Args:
        row (`Row`): The engine and its cells.
        models (`str`): Folder of the models.
        folder (`Path`): Each cell has a folder in it.
        after (`Callable`, *optional*): Called after each cell.
    """
    only = os.environ.get("ODDSMITH_CELLS", "")  # to try a few
    for cell in row.cells:
        if only not in cell:
            continue
        out = folder / cell
        with under(row.engine):
            try:
                result = run(row.engine, EVERY[cell], Path(models), out)
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
        after()
        if os.environ["RANK"] == "0":
            out.mkdir(parents=True, exist_ok=True)
            torch.save(result, out / "result.pt")


def problems(name: str, row: Row, cell: str, folder: Path, alone: "Alone") -> list[str]:
    """
    What is wrong with a cell that two processes have run; empty if it equals one process, or is
    refused in the words of the table.

    Args:
        name (`str`): Name of the engine.
        row (`Row`): The engine.
        cell (`str`): The cell.
        folder (`Path`): That of [`run_cells`].
        alone (`Alone`): The runs of one process.
    """
    found = torch.load(folder / cell / "result.pt")
    refusal = row.refused.get(cell)
    if refusal is not None:
        said = found.get("error", "it ran")
        return [] if refusal in said else [f"{name}: {said}"]
    # peft draws other numbers for a part of a layer.
    start = found.get("before") if cell == LORA_ON_ROWS else None
    lines = [*differences(name, found, alone(cell, row.micro_batches, start), row.path)]
    lines += unsaved(folder / cell / "saved", found)
    if row.engine.distributed is None and not found.keys() & {"resumed", "error"}:
        lines.append("no run was resumed")
    return [f"{name}: {line}" for line in lines]


class Alone:
    """
    The cells in one process, each run once.

    Args:
        models (`Path`): Folder of the models.
        new_folder (`Callable`): Makes a folder for a run.
    """

    def __init__(self, models: Path, new_folder: Callable[[], Path]):
        self.models, self.new_folder = models, new_folder
        self._results: dict[tuple[str, int], dict[str, Any]] = {}

    def __call__(
        self, cell: str, micro_batches: int, start: dict[str, torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """
        What a cell gives; the batches of two processes are micro-batches, one after the other.

        Args:
            cell (`str`): The cell.
            micro_batches (`int`): Their number.
            start (`dict`, *optional*): Values of the trained weights to begin with, the same in each
                call.
        """
        key = (cell, micro_batches)
        if key not in self._results:
            # No checkpoints: a run that is resumed is compared with its own end.
            options: dict[str, Any] = {
                "gradient_accumulation_steps": micro_batches,
                "save_strategy": "no",
                "start": start,
            }
            # The trainer collects garbage, and looks at all objects that tests have imported.
            gc.freeze()
            try:
                with one_thread():
                    result = run(Engine(), EVERY[cell], self.models, self.new_folder(), **options)
                    if cell in TRUTHS:
                        options["start"] = result["before"]
                        truth = run(
                            Engine(), TRUTHS[cell], self.models, self.new_folder(), **options
                        )
                        result["truth"] = truth
            finally:
                gc.unfreeze()
            self._results[key] = result
        return self._results[key]
