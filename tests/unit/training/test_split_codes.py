from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oddsmith.nn import Linear4bit
from oddsmith.training.split_codes import check_codes, check_codes_with_deepspeed


def model_of(storage):
    return nn.Sequential(Linear4bit.from_linear(nn.Linear(64, 64), quant_storage=storage))


def plugin(version=2, computes=None):
    policy = None if computes is None else SimpleNamespace(param_dtype=computes)
    return SimpleNamespace(fsdp_version=version, mixed_precision_policy=policy)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
def test_codes_that_stay_as_they_are(storage):
    check_codes(model_of(storage), plugin())
    check_codes(
        model_of(storage), plugin(computes=torch.bfloat16 if storage.itemsize < 4 else None)
    )
    check_codes(nn.Linear(2, 2), plugin(version=1, computes=torch.bfloat16))


def test_codes_that_would_be_cast():
    message = "stored as float32 and FSDP2 computes in bfloat16.*bnb_4bit_quant_storage='bfloat16'"
    with pytest.raises(ValueError, match=message):
        check_codes(model_of(torch.float32), plugin(computes=torch.bfloat16))


def test_fsdp1():
    with pytest.raises(ValueError, match="FSDP is of version 1"):
        check_codes(model_of(torch.uint8), plugin(version=1))


def test_deepspeed_casts_floats():
    """It casts each parameter on its own, which the layer does not see."""
    in_float32 = model_of(torch.float32)
    for name, other in (("bf16", "bfloat16"), ("fp16", "float16")):
        config = {name: {"enabled": True}}
        check_codes_with_deepspeed(model_of(torch.uint8), config)
        check_codes_with_deepspeed(model_of(getattr(torch, other)), config)
        check_codes_with_deepspeed(in_float32, {name: {"enabled": False}})
        message = f"stored as float32 and DeepSpeed computes in {other}, to which it would cast"
        with pytest.raises(ValueError, match=message):
            check_codes_with_deepspeed(in_float32, config)
