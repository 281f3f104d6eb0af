"""`oddsmith check`: looks at everything that a run needs, and tries it out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

from ..errors import UserError
from .findings import Findings, Problem
from .software import package_problems, packages, system

__all__ = ["look", "run_check"]

_T = TypeVar("_T")
_REPORT = "send the output of `oddsmith check --json` with a bug report"


def run_check(as_json: bool = False, train: bool = False) -> int:
    """
    Prints what was found.

    Args:
        as_json (`bool`, *optional*): As JSON, for bug reports; docs/check.schema.json describes it.
        train (`bool`, *optional*): Also train the demo's model for a few steps in three ways.

    Returns:
        `int`: 0 if what is installed can train, 1 if not.
    """
    found = look(train)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print("\n".join(found.lines()))
    return 0 if found.ready else 1


def look(train: bool = False) -> Findings:
    """Everything that there is to be found, with a progress bar for what takes seconds."""
    found = Findings(packages=packages(), software=system())
    found.problems += package_problems(found.packages)
    try:
        import_core()
    except (ImportError, UserError) as error:
        found.problems.append(_no_torch(found, error))
    if found.ready:
        _look_at_devices(found, train)
    # What keeps a run from starting comes first.
    found.problems.sort(key=lambda problem: not problem.fatal)
    return found


def import_core() -> None:
    """Imports the compiled core, which is a look at torch."""
    from .. import _core  # noqa: F401


def _no_torch(found: Findings, error: Exception) -> Problem:
    """Why the compiled core does not start."""
    known = isinstance(error, ModuleNotFoundError) and not found.ready
    remedy = "install the packages that are missing" if known else _REPORT
    return Problem(str(error), remedy, fatal=True)


def _look_at_devices(found: Findings, train: bool) -> None:
    import torch

    from . import folders, hardware, kernels, routes, speed, trials

    found.software |= hardware.torch_builds()
    found.processor = hardware.processor()
    found.gpus = hardware.gpus()
    found.folders = folders.folders()
    found.problems += hardware.processor_problems(found.processor)
    found.problems += hardware.gpu_problems(found.gpus)
    found.problems += folders.folder_problems(found.folders)
    devices = [torch.device("cpu"), *(torch.device("cuda", gpu.index) for gpu in found.gpus)]
    for device in devices:
        if device.type == "cuda" and torch.version.hip is None:
            # Before anything else is computed there: a kernel with a fault ruins the process it runs in.
            found.kernels += kernels.found(device.index)
        found.routes += routes.routes(device)
        for case, dtype in _shown(list(trials.cases(device)), f"trying out {device}"):
            found.trials.append(trials.outcome(case, device, dtype))
        if all(trial.passed for trial in found.trials if trial.device == str(device)):
            found.speeds += speed.speeds(device)
    # Not tried out: torch has no float64 on some of them.
    others = hardware.other_devices()
    for device in others:
        found.routes += routes.routes(device)
    found.problems += hardware.other_problems(others)
    if train:
        from .training import KINDS, runs

        # What is trained on by default.
        device = devices[-1] if len(devices) > 1 else devices[0]
        found.runs += _shown(runs(device), "training", len(KINDS))
    found.problems += _failures(found)


def _failures(found: Findings) -> list[Problem]:
    problems = []
    for verdict in found.kernels:
        if not verdict.passed:
            what = f"the CUDA kernels {verdict.family} are not used on {verdict.device}: {verdict.fault}"
            problems.append(Problem(what, f"torch's operations take their place; {_REPORT}"))
    for trial in found.trials:
        if not trial.passed:
            how = f"failed: {trial.error}" if trial.error else f"is {trial.deviation:.1e} off"
            what = f"{trial.what} in {trial.dtype} on {trial.device} {how}"
            problems.append(Problem(what, _REPORT, fatal=True))
    for run in found.runs:
        if not run.passed:
            how = (
                f"failed: {run.error}" if run.error else f"{run.packed} packed, {run.padded} padded"
            )
            what = f"training with {run.what} on {run.device}: {how}"
            problems.append(Problem(what, _REPORT, fatal=True))
    return problems


def _shown(items: Iterable[_T], title: str, total: int | None = None) -> Iterable[_T]:
    """With a bar on the terminal, and none in a pipe."""
    return tqdm(items, title, total, file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
