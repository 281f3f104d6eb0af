"""Which CUDA kernels are used on a GPU: those that have proved themselves on it.

The core calls [`settle`] before the first kernel of each GPU, and never on a machine without one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _core
from . import trial_process, verdicts
from .findings import Verdict
from .software import nvidia_driver

__all__ = ["POLICIES", "VARIABLE", "found", "settle"]

VARIABLE = "ODDSMITH_KERNELS"
# What the variable may be, and what it does.
POLICIES = {
    "tested": "families that passed the self-test, which is run once",
    "retest": "the same, and the self-test is run by every process",
    "untested": "all, without a self-test",
    "none": "none: torch's operations take their place",
}
# Seconds that a process waits for another one's self-test before it runs its own.
_WAIT = 600.0

_FAMILIES = {
    "head_forward": "log-probabilities of a head",
    "head_expectation": "gradients of a frozen head",
    "head_gradient": "gradients of a trained head",
    "head_batch": "the loss of a batch",
    "nf4_quantize": "NF4 quantisation",
    "nf4_dequantize": "NF4 dequantisation",
    "nf4_product": "products with NF4 weights",
    "blockwise8": "8-bit blocks",
    "adamw8": "AdamW with moments of 8 bits",
    "adamw32": "AdamW with moments of 32 bits",
}

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_found: dict[int, list[Verdict]] = {}


@dataclass(frozen=True)
class _Gpu:
    """A GPU as its verdicts depend on it."""

    name: str
    uuid: str | None
    capability: str
    driver: str | None

    def __str__(self) -> str:
        return f"{self.name}, capability {self.capability}, driver {self.driver or 'unknown'}"


def settle(gpu: int) -> None:
    """
    Says to the core which families of kernels are used on a GPU, with a warning if some are not.

    Args:
        gpu (`int`): Index of the GPU in torch.

    Raises:
        ValueError: For a value of `ODDSMITH_KERNELS` that there is not.
    """
    with _lock:
        # Another thread may have waited for the same self-test.
        if _core.trusted_kernels(gpu) is None:
            _core.trust_kernels(gpu, _trusted(gpu, policy()))


def policy() -> str:
    """What `ODDSMITH_KERNELS` asks for.

    Raises:
        ValueError: If there is no such value.
    """
    value = os.environ.get(VARIABLE) or "tested"
    if value not in POLICIES:
        raise ValueError(f"ODDSMITH_KERNELS is {value!r}; must be tested, retest, untested or none")
    return value


def found(gpu: int) -> list[Verdict]:
    """The verdicts on a GPU's kernels, tried if they have not been; none where none are asked for."""
    settle(gpu)
    return _found.get(gpu, [])


def _trusted(gpu: int, asked: str) -> list[str]:
    _found.pop(gpu, None)
    families = [name for name, _ in _core.kernel_families()]
    if asked in ("untested", "none"):
        return families if asked == "untested" else []
    try:
        known = _look_at(gpu)
        key = _key(gpu, known)
        results = None if asked == "retest" else verdicts.read(key, f"cuda:{gpu}", families)
        if results is None:
            results = _try(gpu, known, key, families, asked == "retest")
    except Exception as error:
        logger.warning(
            "The self-test of oddsmith's CUDA kernels cannot be run on cuda:%d: %s. Until it can, torch's "
            "operations take their place, which are slower. %s=untested uses the kernels without it.",
            *(gpu, error, VARIABLE),
        )
        return []
    _found[gpu] = results
    failed = [verdict for verdict in results if not verdict.passed]
    if failed:
        logger.warning("%s", _warning(gpu, known, failed))
    return [verdict.family for verdict in results if verdict.passed]


def _try(gpu: int, known: _Gpu, key: str, families: list[str], again: bool) -> list[Verdict]:
    with verdicts.locked(key, _WAIT):
        # Another process may have had the lock before.
        results = None if again else verdicts.read(key, f"cuda:{gpu}", families)
        if results is None:
            logger.info("Trying oddsmith's CUDA kernels on cuda:%d (%s), once", gpu, known)
            results = trial_process.verdicts(gpu, known.uuid, families)
            verdicts.write(key, results)
    return results


def _warning(gpu: int, known: _Gpu, failed: list[Verdict]) -> str:
    alike: dict[str, list[str]] = {}
    for verdict in failed:
        what = f"{_FAMILIES[verdict.family]} ({verdict.family})"
        alike.setdefault(verdict.fault, []).append(what)
    lines = [f"  {', '.join(families)}: {fault}" for fault, families in alike.items()]
    return "\n".join(
        [
            f"CUDA kernels of oddsmith failed their self-test on cuda:{gpu} ({known}):",
            *lines,
            "torch's operations take their place: results are right, and steps are slower. Please report it "
            f"with the output of `oddsmith check --json`. {VARIABLE}=retest runs the self-test again.",
        ]
    )


def _look_at(gpu: int) -> _Gpu:
    if _core.emulates_cuda():
        return _Gpu("emulated GPU", None, "9.0", None)
    properties = torch.cuda.get_device_properties(gpu)
    uuid = getattr(properties, "uuid", None)
    capability = f"{properties.major}.{properties.minor}"
    return _Gpu(properties.name, uuid and str(uuid), capability, nvidia_driver())


def _key(gpu: int, known: _Gpu) -> str:
    """Digest of the GPU, the driver, the kernels, what they are compared with, and how."""
    try:
        text = Path(__file__).with_name("trials.py").read_bytes()
    except OSError:  # a package without its sources
        text = b""
    cases = hashlib.sha256(text).hexdigest()
    versions = [_core.kernel_identity(gpu), _core.__version__, str(torch.__version__), cases]
    parts = [*versions, known.name, known.uuid, known.capability, known.driver]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
