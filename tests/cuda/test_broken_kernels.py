"""Each kernel alone gives a wrong value, or reads far away: its family's trial must find it in the dtype that it serves."""

import re

import pytest
import torch

from oddsmith.check import trials
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
