"""`oddsmith quantize`: checkpoints to NF4 in the format of bitsandbytes, without a model in memory.

The work is done in `src/checkpoint`: a tensor after the other, a few megabytes at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import BitsAndBytesConfig

from . import _core
from .checkpoint_files import (
    INDEX,
    Checkpoint,
    check_free,
    copy_others,
    local_folder,
    staged,
    user_errors,
    write_json,
)
from .checkpoint_names import Names, empty_model
from .checkpoint_plan import DTYPES, Rule
from .errors import UserError
from .quant import dynamic_map
from .quant_state import BLOCK_SIZES

# safetensors' names of the floats that models have.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Summary:
    """
    What has been written.

    Args:
        changed (`int`): Tensors that are not copies.
        tensors (`int`): Tensors that were read.
        read (`int`): Bytes of weights that were read.
        written (`int`): Bytes of weights that were written.
        seconds (`float`): Time that took.
    """

    changed: int
    tensors: int
    read: int
    written: int
    seconds: float

    def __str__(self) -> str:
        speed = self.read / 1e6 / max(self.seconds, 1e-9)
        return (
            f"{self.changed} of {self.tensors} tensors, {self.read / 1e9:.2f} GB to "
            f"{self.written / 1e9:.2f} GB in {self.seconds:.1f} s ({speed:.0f} MB/s)"
        )


def check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"--blocksize {blocksize}: must be one of {allowed}")


def check_dtype(flag: str, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--{flag} {dtype}: must be one of {', '.join(DTYPES)}")


def quantization_config(
    compute_dtype: str, double_quant: bool, skip_modules: list[str] | None
) -> dict[str, Any]:
    """What transformers writes into `config.json` of an NF4 model."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=skip_modules,
    )
    return config.to_dict()


def with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A configuration of a model whose weights have been cast."""
    if dtype is None:
        return dict(config)
    return {name: value for name, value in config.items() if name != "torch_dtype"} | {
        "dtype": dtype
    }


def casts(source: Checkpoint, dtype: str | None, done: Iterable[str]) -> list[Rule]:
    """Rules that bring the remaining floats of a checkpoint to `dtype`."""
    done = set(done)
    return [
        Rule(name, dtype)
        for name, tensor in source.tensors.items()
        if dtype is not None
        and name not in done
        and FLOATS.get(tensor.kind, dtype) != dtype
        and not is_part(source, name)
    ]


def is_part(source: Checkpoint, name: str) -> bool:
    """True for what bitsandbytes keeps beside the codes of a weight."""
    weight, found, _ = name.rpartition(".weight.")
    return bool(found) and f"{weight}.weight" in source.tensors


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    rules: list[Rule],
    config: dict[str, Any],
    *,
    adapter: Path | None = None,
    extra_files: tuple[list[Path], Path] | None = None,
    overwrite: bool = False,
    stepped: bool = False,
) -> Summary:
    """
    Writes a checkpoint with every tensor as its rule says, and the files that go with it.

    Args:
        source ([`Checkpoint`]): What is read.
        out (`Path`): The folder to be. Nothing of it changes unless all of it is written.
        rules (`list[Rule]`): What becomes of tensors; the others are copied.
        config (`dict`): What `config.json` will say.
        adapter (`Path`, *optional*): The safetensors file that rules name tensors of.
        extra_files (`(list[Path], Path)`, *optional*): Files that win over those of `source`, and the
            folder that they are in.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a model that is there.
        stepped (`bool`, *optional*, defaults to `False`): Choose 8-bit codes of scales as
            bitsandbytes does on a CPU, for comparisons with it.

    Raises:
        UserError: For anything that is wrong with files, tensors or the disk.
    """
    if out.exists() and source.path.resolve() == out.resolve():
        raise UserError(f"{out}: is the folder that is read")
    start = time.monotonic()
    with user_errors():
        wanted = _core.converted_size(source.shards, adapter, rules)
    read = sum(shard.stat().st_size for shard in source.shards)
    with staged(out, overwrite) as stage:
        others = source.others()
        check_free(stage, wanted + sum(file.stat().st_size for file in others))
        outputs = [stage / shard.name for shard in source.shards]
        bar = tqdm(total=read, unit="B", unit_scale=True, desc=out.name, disable=None, leave=False)
        with bar:
            names = _core.convert_checkpoint(
                source.shards, adapter, rules, outputs, dynamic_map(), stepped, bar.update
            )
        files = {name: output.name for output, (found, _) in zip(outputs, names) for name in found}
        for output in outputs:
            if output.name not in files.values():  # it held nothing but parts of 4-bit weights
                output.unlink()
        written = [_data_len(output) for output in outputs if output.exists()]
        if source.index is not None:
            metadata = {**source.index.get("metadata", {}), "total_size": sum(written)}
            write_json(stage / INDEX, {"metadata": metadata, "weight_map": files})
        copy_others(others, source.path, stage)
        if extra_files is not None:
            copy_others(*extra_files, stage)
        write_json(stage / "config.json", config)
    return Summary(len(rules), len(source.tensors), read, sum(written), time.monotonic() - start)


def _data_len(path: Path) -> int:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def refuse_quantized(source: Checkpoint) -> None:
    """
    Refuses a checkpoint that is quantised already.

    Raises:
        UserError: It names the method.
    """
    found = source.config.get("quantization_config")
    if found:
        raise UserError(f"{source.path}: is quantised already, with {method_of(found)}")
    for name in source.tensors:
        _, mark, kind = name.rpartition(".quant_state.bitsandbytes__")
        if mark:
            raise UserError(f"{source.path}: is quantised already: {name} is there, of {kind}")
        if name.endswith(".SCB"):
            raise UserError(f"{source.path}: is quantised already: {name} is there, of int8")


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
    stepped: bool = False,
) -> Summary:
    """
    Writes an NF4 checkpoint that transformers and bitsandbytes load.

    What is quantised is what transformers would quantise on loading: the linear layers, without the
    output embeddings and what is tied to them.

    Args:
        model_dir (`str` or `Path`): Folder or hub id of a model in `float32`, `bfloat16` or `float16`.
        out_dir (`str` or `Path`): The folder to be.
        double_quant (`bool`, *optional*, defaults to `False`): Quantise the scales too.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale.
        compute_dtype (`str`, *optional*): Dtype that the layers will compute in; that of the weights
            if not given.
        dtype (`str`, *optional*): Cast weights to this before they are quantised or copied; as they
            are if not given.
        skip (`Iterable[str]`, *optional*): Modules to leave besides.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a model in `out_dir`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run a model's own code.
        stepped (`bool`, *optional*, defaults to `False`): As in [`write_checkpoint`].

    Raises:
        UserError: For files, tensors or arguments that do not fit, NaN or infinity among the weights
            that are quantised, and a full disk. `out_dir` is as it was then.
    """
    check_blocksize(blocksize)
    check_dtype("compute_dtype", compute_dtype)
    check_dtype("dtype", dtype)
    source = Checkpoint(local_folder(model_dir))
    refuse_quantized(source)
    names = Names(empty_model(source.path, trust_remote_code), source.tensors)
    skip = list(skip)
    names.check_skip(skip)
    weights, skipped = names.quantized(skip)
    rules = []
    for name, transposed in weights.items():
        kind = source.tensors[name].kind
        if kind not in FLOATS:
            raise UserError(f"{source.path}: {name} has dtype {kind}; must be {', '.join(FLOATS)}")
        rules.append(
            Rule(
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
    return write_checkpoint(source, out, rules, config, overwrite=overwrite, stepped=stepped)
