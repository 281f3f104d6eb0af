"""The layer that peft creates for a 4-bit layer; what it computes is tested in test_peft_lora.py."""

import pytest
import torch

from oddsmith.integrations.peft_dispatch import LoraDispatch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_try_out_does_not_depend_on_the_default_dtype(dtype, caplog):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with LoraDispatch() as applied:
            assert applied, caplog.text
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "around",
    [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)],
    ids=["meta", "autocast"],
)
def test_the_try_out_does_not_depend_on_the_callers_context(around, caplog):
    with around, LoraDispatch() as applied:
        assert applied, caplog.text
