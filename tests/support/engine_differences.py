"""Where a run of two processes differs from that of one, or from the files that it has saved."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

__all__ = ["differences", "unsaved"]

# No reduction takes another order.
TO_THE_BIT = ("DDP",)

_TIMES = ("runtime", "per_second", "preparation_time")


def differences(
    engine: str, found: dict[str, Any], expected: dict[str, Any], path: str | None = None
) -> Iterator[str]:
    """What is wrong with a run of two processes.

    Args:
        engine (`str`): Its name.
        found (`dict`): What two processes gave.
        expected (`dict`): What one process gave, with its `truth` if the run rounds.
        path (`str`, *optional*): What the engine's path says, if it is another than that of one process.

    Yields:
        `str`: A line for each difference.
    """
    if "error" in found:
        yield found["error"]
        return
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in found["weights"].items():
        if torch.equal(weight, found["before"][name]):
            yield f"{name} has not moved"
        if "resumed" in found and not torch.equal(weight, found["resumed"][name]):
            yield f"{name} differs in a resumed run"
    yield from (f"{name} differs between the processes" for name in found["apart"])
    if path is None and found["path"] != expected["path"]:
        yield found["path"]
    if path is not None and path not in found["path"]:
        yield f"{found['path']} It should say: {path}"
    if "truth" in expected and engine not in TO_THE_BIT:
        yield from _further(found, expected, expected["truth"])
    else:
        yield from _unequal(found, expected, 0.0 if engine in TO_THE_BIT else 1e-4)


def _unequal(found: dict[str, Any], expected: dict[str, Any], room: float) -> Iterator[str]:
    for mine, other in zip(found["losses"], expected["losses"], strict=True):
        if abs(mine - other) > room:
            yield f"loss {mine} for {other}"
    for name, weight in found["weights"].items():
        if (error := (weight - expected["weights"][name]).abs().max().item()) > room:
            yield f"{name} is {error:.1e} off"
    metrics, others = found.get("metrics", {}), expected.get("metrics", {})
    if metrics.keys() != others.keys():
        yield f"metrics {sorted(metrics)} for {sorted(others)}"
    for name, value in metrics.items():
        # Of another order of sums, in evaluation also under DDP.
        if not any(part in name for part in _TIMES) and abs(value - others[name]) > 1e-4:
            yield f"{name} {value} for {others[name]}"


def _further(
    found: dict[str, Any], expected: dict[str, Any], truth: dict[str, Any]
) -> Iterator[str]:
    """Where two processes are further from the truth than one process, which rounds too."""
    if found["losses"] == truth["losses"]:
        yield "nothing was rounded"
    for mine, true in zip(found["losses"], truth["losses"], strict=True):
        # Half a unit in bfloat16's last place.
        if abs(mine - true) > 2.0 ** (math.floor(math.log2(true)) - 8):
            yield f"loss {mine}, without rounding {true}"
    weights = truth["weights"]
    for name, weight in found["weights"].items():
        # A weight with a wrong gradient is as far off as it has moved.
        moved = weights[name] - expected["before"][name]
        if (weight - weights[name]).norm() > moved.norm() / 2:
            yield f"{name} has moved to another place"
    # Of a single weight they are as random as roundings are: those of A, whose gradients are products
    # with B, which begins at zero, differ by a factor of nine.
    factors = {name for name in weights if "lora_A" in name}
    for kind in filter(None, (factors, weights.keys() - factors)):
        mine, other = (
            sum((each["weights"][name] - weights[name]).square().sum() for name in kind) ** 0.5
            for each in (found, expected)
        )
        # FSDP2 rounds gradients too: about as many roundings again. Measured are 0.9 to 1.3.
        if mine > 2 * other:
            yield f"the weights are {mine / other:.2f} times as far from the truth as one process's"


def unsaved(folder: Path, found: dict[str, Any]) -> Iterator[str]:
    """
    Which trained weights are not those in the files that were saved.

    Args:
        folder (`Path`): Where the model was saved.
        found (`dict`): What two processes gave.

    Yields:
        `str`: A line for each weight.
    """
    if "error" in found:
        return
    saved = {
        name: each
        for file in folder.glob("*.safetensors")
        for name, each in load_file(file).items()
    }
    for name, weight in found["weights"].items():
        each, dtype = saved.get(name.replace(".default", "")), found["dtypes"][name]
        # DeepSpeed computes in 16 bits, and has weights of 32 bits beside.
        if each is None or each.dtype != dtype or not torch.equal(each, weight.to(dtype)):
            yield f"{name} was not saved"
