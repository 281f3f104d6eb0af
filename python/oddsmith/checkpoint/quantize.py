"""`oddsmith quantize`: writes NF4 checkpoints in bitsandbytes' format, without loading a model.

The conversion is in `src/checkpoint`: tensor by tensor, a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig

from ..errors import UserError
from ..integrations.model_weights import Names, empty_model
from ..quant.block_sizes import BLOCK_SIZES
from .folder import Checkpoint, local_folder
from .rules import FLOATS, TensorRule
from .write import Summary, casts, check_dtype, with_dtype, write_checkpoint


def check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"--blocksize {blocksize}: must be one of {allowed}")


def quantization_config(
    compute_dtype: str, double_quant: bool, skip_modules: list[str] | None
) -> dict[str, Any]:
    """The `quantization_config` that transformers writes for an NF4 model."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=skip_modules,
    )
    return config.to_dict()


def refuse_quantized(source: Checkpoint) -> None:
    """
    Refuses a checkpoint that is already quantised.

    Raises:
        UserError: If it is quantised; the message names the method.
    """
    found = source.config.get("quantization_config")
    if found:
        raise UserError(f"{source.path}: is already quantised with {method_of(found)}")
    for name in source.tensors:
        _, mark, kind = name.rpartition(".quant_state.bitsandbytes__")
        if mark:
            raise UserError(f"{source.path}: is already quantised: {name} has dtype {kind}")
        if name.endswith(".SCB"):
            raise UserError(f"{source.path}: is already quantised: {name} belongs to int8 weights")


def method_of(config: Any) -> str:
    """The name of the quantisation that a configuration describes."""
    if not isinstance(config, dict):
        return repr(config)
    method = config.get("quant_method", "an unnamed method")
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return "int8 (LLM.int8() of bitsandbytes)"
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        return f"{config.get('bnb_4bit_quant_type', 'fp4')} of bitsandbytes"
    return str(method)


def quantize_checkpoint(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    double_quant: bool = False,
    blocksize: int = 64,
    compute_dtype: str | None = None,
    dtype: str | None = None,
    skip: Iterable[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Summary:
    """
    Writes an NF4 checkpoint that transformers and bitsandbytes can load.

    Quantises the layers that transformers would quantise on loading: linear layers, except the
    output embeddings and weights tied to them.

    Args:
        model_dir (`str` or `Path`): Folder or hub id of a model in `float32`, `bfloat16` or `float16`.
        out_dir (`str` or `Path`): Output folder.
        double_quant (`bool`, *optional*, defaults to `False`): Quantise the scales too.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale.
        compute_dtype (`str`, *optional*): Dtype in which the layers compute; that of the weights if
            not given.
        dtype (`str`, *optional*): Cast weights to this before they are quantised or copied; not
            cast if not given.
        skip (`Iterable[str]`, *optional*): More modules not to quantise.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a model in `out_dir`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Allow code from the model's
            repository.

    Raises:
        UserError: For files, tensors or arguments that do not fit, NaN or infinity in a quantised
            weight, and a full disk. `out_dir` is unchanged then.
    """
    check_blocksize(blocksize)
    check_dtype("compute_dtype", compute_dtype)
    check_dtype("dtype", dtype)
    source = Checkpoint(local_folder(model_dir))
    refuse_quantized(source)
    names = Names(empty_model(source.path, trust_remote_code, len(source.tensors)), source.tensors)
    skip = list(skip)
    names.check_skip(skip)
    weights, skipped = names.quantized(skip)
    rules = []
    for name, transposed in weights.items():
        kind = source.tensors[name].kind
        if kind not in FLOATS:
            raise UserError(f"{source.path}: {name} has dtype {kind}; must be {', '.join(FLOATS)}")
        rules.append(
            TensorRule(
                name,
                dtype or FLOATS[kind],
                transposed=transposed,
                quantize=True,
                blocksize=blocksize,
                double_quant=double_quant,
            )
        )
    compute_dtype = compute_dtype or rules[0].dtype
    config = with_dtype(source.config, dtype)
    config["quantization_config"] = quantization_config(compute_dtype, double_quant, skipped)
    rules += casts(source, dtype, weights)
    out = Path(out_dir)
    return write_checkpoint(source, out, rules, config, overwrite=overwrite)
