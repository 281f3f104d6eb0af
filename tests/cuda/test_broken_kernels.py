"""Each kernel alone gives a wrong value, reads far away, never ends or does not compile: its family's trial must find it."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from oddsmith import _core
from oddsmith.check import trial_process, trials
from support import emulation
from support.broken_kernels import RESULTS

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_NAME = re.compile(r"(?P<op>\w+?)(?:_(?P<dtype>f32|bf16|f16)(?:_f32)?)?")


def parts_of(kernel):
    """What is in [`RESULTS`] for a kernel, and its dtype."""
    match = _NAME.fullmatch(kernel)
    assert match is not None
    # Sums of products of halves, which float32 does not need.
    default = "bf16" if match["op"] == "head_add" else "f32"
    return *RESULTS[match["op"]], DTYPES[match["dtype"] or default]


def assert_found(driver, monkeypatch, kernel):
    family, parameters, offset, dtype = parts_of(kernel)
    (case,) = (case for case in trials.CASES if case.family == family)
    for way, parameter in [("wrong", each) for each in parameters] + [("bounds", parameters[0])]:
        monkeypatch.setenv("EMULATOR_FAULT", f"{way}:={kernel}:{parameter}:{offset}")
        driver.reset()
        trial = trials.outcome(case, torch.device("cpu"), dtype)
        launched = {launch.kernel for launch in driver.launches()}
        assert kernel in launched, f"{kernel} is not launched by {family}"
        assert not trial.passed, f"{way} {parameter} of {kernel}: {trial}"
        if way == "bounds":
            assert "CUDA_ERROR_ILLEGAL_ADDRESS" in (trial.error or "")
    driver.reset()


def test_every_kernel_is_listed():
    found = {_NAME.fullmatch(kernel)["op"] for kernel in emulation.kernel_names()}  # pyright: ignore[reportOptionalSubscript]
    assert found == set(RESULTS)


@pytest.mark.parametrize("kernel", ["adamw8bit_bf16_f32", "head_layout", "nf4_multiply1_f16"])
def test_a_kernel_that_is_broken(kernel, emulated_driver, monkeypatch):
    assert_found(emulated_driver, monkeypatch, kernel)


@pytest.mark.slow
def test_every_kernel_that_is_broken(emulated_driver, monkeypatch):
    missed = []
    for kernel in sorted(emulation.kernel_names()):
        try:
            assert_found(emulated_driver, monkeypatch, kernel)
        except AssertionError as error:
            missed.append(str(error).splitlines()[0])
    assert not missed, "\n".join(missed)


# ---- one that never ends ----


def not_ended(kernels, monkeypatch, limit, together):
    """The errors of the kernels' families, each tried with this one kernel that never ends."""
    # Of the second try nothing is left to find: a family whose kernels all end has passed in the first.
    monkeypatch.setattr(trial_process, "LIMITS", (limit, 0.1))
    given, own = trial_process.environment, threading.local()
    monkeypatch.setattr(
        trial_process, "environment", lambda env, gpu: given(env, gpu) | own.environment
    )

    def error(kernel):
        own.environment = {"EMULATOR_FAULT": f"hang:={kernel}:0"}
        (verdict,) = trial_process.verdicts(0, None, [parts_of(kernel)[0]])
        return verdict.error

    # They wait for most of the time.
    with ThreadPoolExecutor(together) as threads:
        return dict(zip(kernels, threads.map(error, kernels), strict=True))


def test_a_kernel_that_never_ends(untried, monkeypatch):
    """The last one of a family's last dtype: the others have ended before."""
    kernel = "adamw8bit_bf16_f32"
    assert "not ended within" in (not_ended([kernel], monkeypatch, 5.0, 1)[kernel] or "")


@pytest.mark.slow
def test_every_kernel_that_never_ends(untried, monkeypatch):
    errors = not_ended(sorted(emulation.kernel_names()), monkeypatch, 30.0, 4)
    assert errors and [name for name, error in errors.items() if "ended" not in (error or "")] == []


# ---- one that does not compile ----


@pytest.mark.slow
def test_every_kernel_that_does_not_compile(untried, monkeypatch):
    """What is compiled is a source as a whole: none of the families that it serves is used."""
    sources = dict(_core.kernel_families())
    first = {kernel: sources[parts_of(kernel)[0]][0] for kernel in emulation.kernel_names()}
    for source in sorted(set(first.values())):
        monkeypatch.setenv("EMULATOR_COMPILE_ERROR", source)
        served = [name for name, names in sources.items() if source in names]
        failed = trial_process.verdicts(0, None, served)
        assert all(
            f"{source}(1): error: broken on purpose" in (each.error or "") for each in failed
        )
        assert {parts_of(kernel)[0] for kernel in first if first[kernel] == source} <= set(served)
