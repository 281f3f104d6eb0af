"""Attention over a packed row of sequences, for the models of transformers.

A batch is packed into one row of real tokens, `[sequence 0 | sequence 1 | ..]`, and attention stays
within each sequence: no pads, no mask matrix. The function is registered with transformers'
`AttentionInterface` under a name of its own, and stands for `sdpa` wherever a call names no
sequences (generation, a batch that was not packed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

# No part of it may be a name that transformers looks for, such as "sdpa" or "flash".
NAME = "oddsmith_packed"

# Keyword that carries the lengths of the packed sequences through the model to `attend`.
LENGTHS = "oddsmith_lengths"

# What some models hand to their attention and this one does not compute.
_UNKNOWN = ("softcap", "position_bias", "s_aux")


class CannotPack(Exception):
    """A model's attention cannot work on packed rows. The message is the reason."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Causal attention within each sequence of a packed row.

    Args:
        module (`nn.Module`): The attention layer.
        query (`Tensor`): `(1, heads, N, d)`.
        key (`Tensor`): `(1, key heads, N, d)`.
        value (`Tensor`): As `key`.
        attention_mask (`Tensor`, *optional*): Not used for packed rows.
        dropout (`float`, *optional*): Rate of dropout on the attention weights.
        scaling (`float`, *optional*): Factor on the products; one over the root of d if not given.
        sliding_window (`int`, *optional*): Positions that a token sees, itself included.
        kwargs: `oddsmith_lengths`, a tuple of the sequences' lengths, which sum to N; without it
            the call goes to transformers' `sdpa`.

    Returns:
        `tuple`: `(1, N, heads, d)`, and None for the weights.

    Raises:
        [`CannotPack`]: If the layer asks for something that is not computed here.
    """
    lengths = kwargs.pop(LENGTHS, None)
    if lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise CannotPack(f"its attention has a {', '.join(unknown)}")
    if not getattr(module, "is_causal", True):
        raise CannotPack("its attention is not causal")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    sides = (x.split(lengths, dim=2) for x in (query, key, value))
    out = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window(q.shape[2], sliding_window, q.device),
            dropout_p=dropout,
            is_causal=sliding_window is None or q.shape[2] <= sliding_window,
            scale=scaling,
        )
        for q, k, v in zip(*sides, strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Mask of a causal band, where the sequence is longer than the window."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < sliding_window)


def register() -> None:
    """Make the implementation known to transformers. Idempotent."""
    AttentionInterface.register(NAME, attend)
    # Without an entry of its own, transformers would drop the padding mask of other calls.
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@torch.no_grad()
def install(core: nn.Module) -> None:
    """
    Let a model attend within packed sequences, if that gives what it gives on a padded batch.

    Changes only which attention the configuration names.

    Raises:
        [`CannotPack`]: With the reason. The model is as it was.
    """
    config = core.config
    before = config._attn_implementation
    if before == NAME:
        return
    if before != "sdpa":
        raise CannotPack(f"its attention is {before!r}, not 'sdpa'")
    register()
    training = {module: module.training for module in core.modules()}
    core.eval()
    config._attn_implementation = NAME
    try:
        reason = _try_out(core)
    except CannotPack as cannot:
        reason = str(cannot)
    except Exception as error:  # whatever a model's own code may raise
        reason = f"a packed row could not be tried out ({type(error).__name__}: {error})"
    finally:
        for module, mode in training.items():
            module.training = mode
    if reason is not None:
        config._attn_implementation = before
        raise CannotPack(reason)


def _try_out(core: nn.Module) -> str | None:
    """Compares two short sequences packed and padded; what is wrong, or None."""
    device = core.get_input_embeddings().weight.device
    if device.type == "meta":
        return "its weights are not in memory, so a packed row cannot be tried out"
    # Low ids: the high ones of some models stand for images. Equal prefixes: only the position and
    # the neighbours tell the two sequences apart.
    lengths = (7, 4)
    ids = torch.tensor([[3, 5, 4, 6, 5, 3, 4], [3, 5, 4, 6, 0, 0, 0]], device=device)
    mask = torch.arange(7, device=device) < torch.tensor(lengths, device=device)[:, None]
    packed = core(**packed_inputs(ids, mask, lengths), use_cache=False).logits[0]
    padded = core(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[mask]
    room = 64 * torch.finfo(packed.dtype).eps * (1.0 + padded.abs().max())
    if packed.shape != padded.shape or (packed - padded).abs().max() > room:
        return "it gives other results on a packed row than on a padded batch"
    return None


def packed_inputs(input_ids: Tensor, real: Tensor, lengths: tuple[int, ...]) -> dict[str, Any]:
    """
    A padded batch as one row of real tokens.

    Args:
        input_ids (`Tensor`): `(2B, T)`.
        real (`Tensor`): True for real tokens, `(2B, T)`; pads on the right.
        lengths (`tuple[int, ...]`): Real tokens of each sequence.

    Returns:
        `dict`: Arguments of the model's forward.
    """
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return {
        "input_ids": input_ids[real][None],
        "position_ids": position[real][None],
        # Four dimensions: transformers takes it for a finished mask and makes none.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        LENGTHS: lengths,
    }
