"""Sizes and numbers from data that nothing can have: an error of Python each time, never an abort.

Run as a script this file makes the calls, with a limit on its memory: an allocation by such a number
would end the process.
"""

import copy
import json
import resource
import subprocess
import sys
from functools import partial

import numpy as np
import torch

from oddsmith import _core
from oddsmith.functional import dequantize_nf4, linear_nf4, linear_orpo, quantize_nf4
from oddsmith.optim.adamw.adamw_8bit import AdamW8bit
from oddsmith.quant.nf4 import dynamic_map

NUMBERS = [
    0,
    -1,
    1,
    3,
    65,
    2**16,
    10**9,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    -(2**31),
    -(2**63),
]
REALS = [0.0, -1.0, 1e-320, 1e-45, 1e39, 1e308, float("inf"), float("nan")]
MEMORY = 8 << 30
# What a user can be expected to catch.
ERRORS = (ValueError, TypeError, RuntimeError, MemoryError, OverflowError)


def orpo(rows=None, **changed):
    """A loss and its gradients; `rows` changes one value of an argument of rows."""
    arguments = {
        "hidden": torch.ones(6, 8, requires_grad=True),
        "weight": torch.ones(10, 8, requires_grad=True),
        "targets": torch.arange(6),
        "sequence": torch.arange(6) // 3,
        "completion": torch.arange(6) % 3 > 0,
        "beta": 0.1,
        **changed,
    }
    for (name, place), value in (rows or {}).items():
        arguments[name][place] = value
    out = linear_orpo(**arguments)
    out.loss.backward()
    return out.loss, arguments["hidden"].grad


def nf4(shape=None, blocksize=None, nested=None):
    packed, state = quantize_nf4(torch.ones(64, 64), double_quant=nested is not None)
    state = copy.copy(state)
    if shape is not None:
        state.shape = torch.Size(shape)
    if blocksize is not None:
        state.blocksize = blocksize
    if nested is not None:
        state.state2.blocksize = nested
    return packed, state


def dequantized(**changed):
    return dequantize_nf4(*nf4(**changed))


def product(**changed):
    return linear_nf4(torch.ones(3, 64), *nf4(**changed))


def eight_bits(quantise, restore):
    codes, absmax = _core.quantize_blockwise(torch.ones(500), dynamic_map(), quantise)
    return _core.dequantize_blockwise(codes, absmax, dynamic_map(), restore, "float32")


def step(**options):
    parameter = torch.nn.Parameter(torch.ones(5000))
    parameter.grad = torch.ones(5000)
    AdamW8bit([parameter], **options).step()
    return parameter


def encoded(offset=None, **changed):
    from tokenizers import Tokenizer, models

    options = {
        "split_special_tokens": False,
        "bos": None,
        "eos": None,
        "label_pad": -100,
        "max_length": 8,
        "max_prompt_length": None,
        "truncation_mode": "keep_end",
        **changed,
    }
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str()
    texts = b"abc", np.array([0, 3 if offset is None else offset], dtype="<i8").tobytes()
    encoder = _core.RowEncoder(tokenizer, **options)
    return encoder.columns(texts, texts, texts, name="x", first_row=0, parallel=False)


def calls():
    """A name and a function for each call."""
    for number in NUMBERS:
        for name in ("sequence", "targets"):
            for place in (0, 5):
                yield f"{name}[{place}] = {number}", partial(orpo, {(name, place): number})
        for name in ("num_pairs", "num_scored", "logits_budget"):
            for answers in (torch.arange(6) % 3 > 0, torch.zeros(6, dtype=torch.bool)):
                yield f"{name} = {number}", partial(orpo, completion=answers, **{name: number})
        for shape in ((number, 64), (64, number), (number, number), (number,), (number,) * 3):
            yield f"dequantize_nf4 {shape}", partial(dequantized, shape=shape)
            yield f"linear_nf4 {shape}", partial(product, shape=shape)
        yield f"quantize_nf4 in {number}", partial(quantize_nf4, torch.ones(99), number)
        yield f"dequantize_nf4 in {number}", partial(dequantized, blocksize=number)
        yield f"linear_nf4 in {number}", partial(product, blocksize=number)
        yield f"dequantize_nf4, scales in {number}", partial(dequantized, nested=number)
        yield f"blocks of {number}", partial(eight_bits, number, 256)
        yield f"blocks of {number} back", partial(eight_bits, 256, number)
        for name in ("min_8bit_size", "optim_bits", "seed"):
            yield f"AdamW8bit {name} = {number}", partial(step, **{name: number})
        for name in ("bos", "eos", "label_pad", "max_length", "max_prompt_length"):
            yield f"RowEncoder {name} = {number}", partial(encoded, **{name: number})
        yield f"RowEncoder, text to {number}", partial(encoded, offset=number)
    for number in REALS:
        for name in ("beta", "softcap", "logit_scale"):
            yield f"{name} = {number}", partial(orpo, **{name: number})


def main():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    made = 0
    for name, call in calls():
        print(f"{name}: ", end="", flush=True)  # the last line of an abort names its call
        try:
            result = call()
        except ERRORS as error:
            print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            print("fine")
            for tensor in result if isinstance(result, tuple) else (result,):
                if torch.is_tensor(tensor) and not tensor.isfinite().all():
                    sys.exit(f"{name} is accepted, and its result is not finite")
        made += 1
    print(json.dumps({"calls": made}))


def test_no_call_aborts():
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, errors="replace", timeout=500
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}\n{done.stderr[-2000:]}"
    assert json.loads(lines[-1]) == {"calls": len(list(calls()))}
    assert "panic" not in done.stdout + done.stderr


if __name__ == "__main__":
    main()
