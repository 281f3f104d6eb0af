"""Tries a model on a packed row: against a padded batch, and for leaks between sequences."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..packing.batch import PackedBatch
from .attention_names import attention_named
from .model_attention import CannotPack, packed_inputs, row_of
from .model_core import observed
from .small_model import class_of

__all__ = [
    "DIFFERS",
    "EXACT",
    "FAILS",
    "LONGEST",
    "MOST",
    "OWN_CODE",
    "UNSEEN",
    "Blind",
    "Lengths",
    "lengths_up_to",
    "tokens_of",
    "try_out",
]

#: Lengths of prompt, chosen and rejected answer of each pair.
Lengths = tuple[tuple[int, int, int], ...]

#: Room for rounding, in units of a dtype's precision times the largest logit.
EXACT = 800.0

#: Beginning of a reason: the model raises an error.
FAILS = "a packed row could not be tried out"
#: Of a result that is not that of the padded batch.
DIFFERS = "its results on a packed row differ from those on a padded batch"

#: Its attention function was not called with the row.
UNSEEN = "its attention does not get the packed row"
#: Of a class that does not call the functions of transformers' table, where ours would be.
OWN_CODE = "its class computes attention in code of its own"

# Longer than the windows and chunks of a small model. The last pair shares nothing.
_LENGTHS: Lengths = ((6, 7, 5), (9, 6, 8), (1, 6, 9))
#: The longest sequence, and no fewer tokens than the packed row has.
LONGEST = max(prompt + max(answers) for prompt, *answers in _LENGTHS)
MOST = sum(2 * prompt + sum(answers) for prompt, *answers in _LENGTHS)
# The pair whose chosen answer is changed: with others before and after it.
_CHANGED = 1
# Ids of the tokens: low ones, because high ones of some models are image tokens.
_FIRST, _COUNT = 3, 11


class Blind(Exception):
    """A model's results hardly depend on the tokens, so that a trial proves nothing."""


def lengths_up_to(longest: int) -> Lengths:
    """Four pairs with sequences of up to so many tokens."""
    half, third, quarter = (longest // part for part in (2, 3, 4))
    whole = (1, longest - 1, longest - 1)
    return (
        (half, longest - half, third),
        whole,  # the one that is changed: near its start, where the effect is largest
        (quarter, half, longest - quarter),
        whole,
    )


def tokens_of(lengths: Lengths) -> int:
    """Tokens of the packed row of pairs."""
    return sum(map(sum, lengths))


@torch.no_grad()
def try_out(
    core: Any, room: float = EXACT, reference: str | None = None, lengths: Lengths = _LENGTHS
) -> str | None:
    """
    Compares pairs in a packed row with the same pairs in a padded batch, and checks that no sequence
    changes with a token of another one, to the bit. Nothing is changed.

    Args:
        core (`PreTrainedModel`): The model, without wrappers.
        room (`float`, *optional*): Largest difference from the padded batch, in units of the
            precision of the logits times the largest one.
        reference (`str`, *optional*): Name of the attention that computes the padded batch, for a
            small model; by default its own.
        lengths (`tuple`, *optional*): Those of the pairs.

    Returns:
        `str`: What is wrong, or None.

    Raises:
        [`Blind`]: If the logits do not depend on earlier tokens, or are not finite.
    """
    device = core.get_input_embeddings().weight.device
    pairs = _pairs(core, lengths)
    batch = PackedBatch.build(pairs, share_prompt=True).to(device)
    try:
        with observed(core), torch.autocast(device.type, enabled=False):
            return _compare(core, batch, pairs, room, reference)
    except Blind:
        raise
    except CannotPack as cannot:
        return str(cannot)
    except Exception as error:  # whatever a model's own code may raise
        return f"{FAILS} ({type(error).__name__}: {error})"


def _pairs(core: Any, lengths: Lengths) -> list[dict[str, list[int]]]:
    draw = Random(3)
    last = core.get_input_embeddings().weight.shape[0]
    count = max(2, min(_COUNT, last - _FIRST))

    def tokens(length: int) -> list[int]:
        return [_FIRST + draw.randrange(count) for _ in range(length)]

    pairs = []
    for prompt, *answers in lengths:
        shared, pair = tokens(prompt), {}
        for side, length in zip(("chosen", "rejected"), answers, strict=True):
            answer = tokens(length)
            pair[f"{side}_input_ids"] = shared + answer
            pair[f"{side}_labels"] = [-100] * prompt + answer
        pairs.append(pair)
    return pairs


def _compare(
    core: Any, batch: PackedBatch, pairs: list[Any], room: float, reference: str | None
) -> str | None:
    router = bool(getattr(core.config, "output_router_logits", False))
    inputs = packed_inputs(batch, router)
    row = row_of(inputs)
    outputs = core(**inputs, use_cache=False)
    whole = outputs.logits
    if not row.seen:
        return UNSEEN if _asks_the_table(core) else f"{UNSEEN}: {OWN_CODE}"
    other = _other_layers(core, row.seen)
    if other is not None:
        return f"its {other} does not attend through the function that gets the packed row"
    named = nullcontext() if reference is None else attention_named(core, reference)
    with named:
        padded, aux_loss = _padded(core, pairs, batch)
    packed = whole[0, batch.rows]
    if packed.shape != padded.shape:
        return DIFFERS
    changed, inside, after = _changed(batch)
    again = core(**packed_inputs(changed), use_cache=False).logits
    difference = (again - whole)[0].abs().amax(dim=-1)
    effect, scale = difference[after].max(), padded.abs().max()
    if not torch.isfinite(whole).all() or not torch.isfinite(padded).all() or effect < 2e-3 * scale:
        raise Blind
    outside = torch.ones_like(difference, dtype=torch.bool)
    outside[inside] = False
    # Experts compute the tokens that they get in one product, whose rounding depends on its size.
    leak = 1e-3 * effect if _has_experts(core) else 0.0
    if difference[outside].max() > leak:
        return "in a packed row, its results for a sequence change with the tokens of another"
    allowed = room * torch.finfo(_coarsest(core, packed.dtype)).eps * scale
    if (packed - padded).abs().max() > allowed:
        return DIFFERS
    # With less precision, a token may be given to another expert.
    if router and room <= EXACT and not _is_close(outputs.aux_loss, aux_loss):
        return "its auxiliary loss on a packed row differs from that of a padded batch"
    return None


def _is_close(a: Any, b: Any) -> bool:
    """Of the auxiliary losses, which some models do not compute."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _padded(core: Any, pairs: list[Any], batch: PackedBatch) -> tuple[Tensor, Any]:
    """The logits of a padded batch, in the order of the packed batch's rows, and its auxiliary
    loss.
    """
    # All rows that predict: chosen and rejected of each pair.
    sequences = [pair[f"{side}_input_ids"] for pair in pairs for side in ("chosen", "rejected")]
    device = batch.input_ids.device
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for index, sequence in enumerate(sequences):
        ids[index, : len(sequence)] = torch.tensor(sequence, device=device)
        mask[index, : len(sequence)] = 1
    outputs = core(input_ids=ids, attention_mask=mask, use_cache=False)
    lengths = enumerate(map(len, sequences))
    rows = [outputs.logits[index, : length - 1] for index, length in lengths]
    return torch.cat(rows), getattr(outputs, "aux_loss", None)


def _changed(batch: PackedBatch) -> tuple[PackedBatch, slice, slice]:
    """
    The batch with another first token in a chosen answer; the positions that may change; and those
    after the token, which must.
    """
    shared, chosen, _ = batch.segments[_CHANGED]
    start = sum(map(sum, batch.segments[:_CHANGED])) + shared
    stop = start + chosen
    # The prompt's last token is the first of the answer's part.
    place = start + 1
    ids = batch.input_ids.clone()
    ids[0, place] = _FIRST if ids[0, place] != _FIRST else _FIRST + 1
    return (
        PackedBatch(**{**vars(batch), "input_ids": ids}),
        slice(place, stop),
        slice(place + 1, stop),
    )


def _asks_the_table(core: nn.Module) -> bool:
    """Whether the code of a model imports transformers' table of attention functions."""
    modules = {class_of(each).__module__ for each in core.modules()}
    return any(hasattr(sys.modules.get(name), "ALL_ATTENTION_FUNCTIONS") for name in modules)


def _other_layers(core: nn.Module, seen: set[nn.Module]) -> str | None:
    """The class of a layer, beside those that attend to a packed row, that does not."""
    for layers in core.modules():
        if isinstance(layers, nn.ModuleList):
            attends = [any(part in seen for part in layer.modules()) for layer in layers]
            if any(attends) and not all(attends):
                index = attends.index(False)
                return f"layer {index} ({type(layers[index]).__name__})"
    return None


def _has_experts(core: nn.Module) -> bool:
    return any("expert" in name.lower() for name, _ in core.named_modules())


def _coarsest(core: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype with the least precision that a model computes in."""
    found = {dtype} | {p.dtype for p in core.parameters() if p.is_floating_point()}
    layers = {getattr(module, "compute_dtype", None) for module in core.modules()}
    found |= {each for each in layers if isinstance(each, torch.dtype)}
    wide = [each for each in found if each.itemsize > 1]  # others are only stored
    return max(wide, key=lambda each: torch.finfo(each).eps)
