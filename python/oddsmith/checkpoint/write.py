"""A checkpoint written tensor by tensor: rules in, files and a summary out."""

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
from .rules import DTYPES, FLOATS, Rule
from .staging import check_free, copy_others, staged, write_json


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


def check_dtype(flag: str, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--{flag} {dtype}: must be one of {', '.join(DTYPES)}")


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

    Raises:
        UserError: For anything that is wrong with files, tensors or the disk.
    """
    if out.exists() and source.path.resolve() == out.resolve():
        raise UserError(f"{out}: is the folder that is read")
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
