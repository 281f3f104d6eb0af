"""Writes a checkpoint tensor by tensor from rules, and returns a summary."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import _core
from ..errors import UserError
from ..quant.nf4 import dynamic_map
from .folder import INDEX, Checkpoint, file_errors
from .rules import DTYPES, FLOATS, TensorRule
from .staging import check_free, copy_others, staged, write_json


@dataclass(frozen=True)
class Summary:
    """Counts of a conversion.

    Args:
        changed (`int`): Tensors that are not copies.
        tensors (`int`): Tensors that were read.
        read (`int`): Bytes of weights that were read.
        written (`int`): Bytes of weights that were written.
        seconds (`float`): Duration.
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


def check_dtype(flag: str, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--{flag} {dtype}: must be one of {', '.join(DTYPES)}")


def with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The configuration of a model after its weights were cast."""
    if dtype is None:
        return dict(config)
    return {name: value for name, value in config.items() if name != "torch_dtype"} | {
        "dtype": dtype
    }


def casts(source: Checkpoint, dtype: str | None, done: Iterable[str]) -> list[TensorRule]:
    """Rules that cast the remaining float tensors of a checkpoint to `dtype`."""
    done = set(done)
    return [
        TensorRule(name, dtype)
        for name, tensor in source.tensors.items()
        if dtype is not None
        and name not in done
        and FLOATS.get(tensor.kind, dtype) != dtype
        and not is_part(source, name)
    ]


def is_part(source: Checkpoint, name: str) -> bool:
    """True for the entries that bitsandbytes stores with the codes of a weight."""
    weight, found, _ = name.rpartition(".weight.")
    return bool(found) and f"{weight}.weight" in source.tensors


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    rules: list[TensorRule],
    config: dict[str, Any],
    *,
    adapter: Path | None = None,
    extra_files: tuple[list[Path], Path] | None = None,
    overwrite: bool = False,
) -> Summary:
    """
    Writes a checkpoint, converted by rules, and its other files.

    Args:
        source ([`Checkpoint`]): Checkpoint to read.
        out (`Path`): Output folder. It is unchanged unless everything is written.
        rules (`list[TensorRule]`): Rules of tensors; the others are copied.
        config (`dict`): Contents of the new `config.json`.
        adapter (`Path`, *optional*): Safetensors file of the adapter's tensors in rules.
        extra_files (`(list[Path], Path)`, *optional*): Files that replace those of `source`, and
            their folder.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an existing model.

    Raises:
        UserError: For errors of files, tensors or the disk.
    """
    if out.exists() and source.path.resolve() == out.resolve():
        raise UserError(f"{out}: is the input folder")
    start = time.monotonic()
    with file_errors():
        wanted = _core.converted_size(source.shards, adapter, rules)
    read = sum(shard.stat().st_size for shard in source.shards)
    with staged(out, overwrite) as stage:
        others = source.others()
        check_free(stage, wanted + sum(file.stat().st_size for file in others))
        outputs = [stage / shard.name for shard in source.shards]
        bar = tqdm(total=read, unit="B", unit_scale=True, desc=out.name, disable=None, leave=False)
        with bar:
            made = _core.convert_checkpoint(
                source.shards, adapter, rules, outputs, dynamic_map(), bar.update
            )
        files = {name: out.name for out, file in zip(outputs, made) for name in file["names"]}
        for output in outputs:
            if output.name not in files.values():  # it only had parts of 4-bit weights
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
