"""The cells of an engine in two processes, and those of one process that they are compared with."""

import gc
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .engine_cells import EVERY, TRUTHS
from .engine_runs import run
from .engines import Engine, under
from .processes import one_thread

__all__ = ["Alone", "result_of", "run_cells"]


def run_cells(
    engine: Engine,
    cells: Iterable[str],
    models: str,
    folder: Path,
    after: Callable[[], None] = lambda: None,
) -> None:
    """
    What each of two processes runs: the cells of an engine, one after the other. [`result_of`] reads
    what they gave.

    Args:
        engine (`Engine`): How a run is spread.
        cells (`Iterable`): Names of cells.
        models (`str`): Folder of the models.
        folder (`Path`): Each cell has a folder in it.
        after (`Callable`, *optional*): Called after each cell.
    """
    only = os.environ.get("ODDSMITH_CELLS", "")  # to try a few
    for cell in cells:
        if only not in cell:
            continue
        out = folder / cell
        with under(engine):
            try:
                result = run(engine, EVERY[cell], Path(models), out)
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
        after()
        if os.environ["RANK"] == "0":
            out.mkdir(parents=True, exist_ok=True)
            torch.save(result, out / "result.pt")


def result_of(folder: Path, cell: str) -> dict[str, Any]:
    """What a cell gave in two processes."""
    return torch.load(folder / cell / "result.pt")


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

    def __call__(self, cell: str, micro_batches: int = 2) -> dict[str, Any]:
        """What a cell gives; the batches of two processes are micro-batches, one after the other."""
        key = (cell, micro_batches)
        if key not in self._results:
            options: dict[str, Any] = {"gradient_accumulation_steps": micro_batches}
            # The trainer collects garbage, and looks at all objects that tests have imported.
            gc.freeze()
            try:
                with one_thread():
                    result = run(Engine(), EVERY[cell], self.models, self.new_folder(), **options)
                    if cell in TRUTHS:
                        options |= {"save_strategy": "no", "start": result["before"]}
                        truth = run(
                            Engine(), TRUTHS[cell], self.models, self.new_folder(), **options
                        )
                        result["truth"] = truth
            finally:
                gc.unfreeze()
            self._results[key] = result
        return self._results[key]
