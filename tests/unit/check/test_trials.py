"""Every family is right here, and a family that is broken is found."""

import pytest
import torch

from oddsmith import _core
from oddsmith.check import trials

CPU = torch.device("cpu")
CASES = list(trials.cases(CPU))


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_a_family(case, dtype):
    trial = trials.outcome(case, CPU, dtype)
    assert trial.passed, trial
    assert trial.error is None


def test_every_family_is_in_the_table():
    families = [name for name, _ in _core.kernel_families()]
    assert [case.family for case in trials.CASES] == families
    assert {dtype for _, dtype in CASES} == {torch.float32, torch.bfloat16}


# One wrong value, as a kernel with a fault would give it.
BROKEN = {
    "head, forward": "linear_logps",
    "head, gradients": "linear_logps",
    "NF4, dequantise": "dequantize_nf4",
    "NF4, products": "linear_nf4",
}


@pytest.mark.parametrize("fault", ["wrong", "nan", "shape", "error"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_family_that_is_broken(monkeypatch, name, fault):
    right = getattr(trials, BROKEN[name])

    def broken(*arguments, **options):
        if fault == "error":
            raise RuntimeError("cuLaunchKernel: invalid argument\nand more")
        result = right(*arguments, **options)
        if fault == "shape":
            return result[..., :-1]
        wrong = torch.ones_like(result)
        wrong.view(-1)[result.abs().argmax()] = 1.2 if fault == "wrong" else float("nan")
        return result * wrong

    monkeypatch.setattr(trials, BROKEN[name], broken)
    (case,) = [case for case in trials.CASES if case.name == name]
    for dtype in (torch.float32, torch.bfloat16):
        trial = trials.outcome(case, CPU, dtype)
        assert not trial.passed, trial
        assert fault != "error" or trial.error == "RuntimeError: cuLaunchKernel: invalid argument"


def test_the_distance():
    true = torch.tensor([2.0, -4.0], dtype=torch.float64)
    assert trials.farthest([torch.tensor([2.0, -3.0])], [true]) == 0.25
    assert trials.farthest([torch.tensor([2.0, float("nan")])], [true]) == float("inf")
    assert trials.farthest([torch.tensor([2.0])], [true]) == float("inf")
