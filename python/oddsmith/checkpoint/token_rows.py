"""Rows of embeddings that an adapter trained (`trainable_token_indices`), as whole tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..errors import UserError
from .adapter import Adapter
from .folder import Checkpoint, file_errors

__all__ = ["rows_name", "write_with_rows"]


def rows_name(module: str) -> str:
    """Name of the whole tensor of a module in the file of [`write_with_rows`]."""
    return f"{module}.weight with its trained rows"


def write_with_rows(
    source: Checkpoint, adapter: Adapter, keys: dict[str, str], folder: Path
) -> Path:
    """
    Writes the tensors of an adapter again, with the embeddings whose rows it replaces.

    Args:
        source ([`Checkpoint`]): The base, in full precision.
        adapter ([`Adapter`]): The adapter.
        keys (`dict[str, str]`): By module of `adapter.token_rows`, the name of its weight in the
            base.
        folder (`Path`): Where the file is written; it has a `float32` copy of each embedding.

    Returns:
        `Path`: The file. The embeddings are named by [`rows_name`].

    Raises:
        UserError: If the rows do not fit the embedding.
    """
    with file_errors():
        tensors = load_file(adapter.file)
    for module, key in keys.items():
        name = adapter.token_rows[module]
        rows, indices = tensors.pop(name), adapter.token_indices(module)
        whole = _read(source, key).float()
        if rows.shape != (len(indices), whole.shape[1]) or max(indices) >= whole.shape[0]:
            raise UserError(
                f"{adapter.file}: {name} has shape {tuple(rows.shape)} for the tokens {indices}, and "
                f"{key} has shape {tuple(whole.shape)}"
            )
        tensors[rows_name(module)] = whole.index_copy(0, torch.tensor(indices), rows.float())
    path = folder / adapter.file.name
    save_file(tensors, path)
    return path


def _read(source: Checkpoint, key: str) -> torch.Tensor:
    with file_errors():
        for shard in source.shards:
            with safe_open(shard, framework="pt") as file:
                if key in file.keys():  # noqa: SIM118  # the file is no dictionary
                    return file.get_tensor(key)
    raise UserError(f"{source.path}: has no {key}")
