"""One architecture tried out: the path of its batches, and how far two steps are from the plain path."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor

from oddsmith.integrations import model_packing
from oddsmith.integrations.model_path import TrainingPath, path_of
from oddsmith.integrations.packed_trial import LONGEST, MOST
from oddsmith.integrations.small_model import NotSmall, small_model

from .architectures import cases, configurations, core
from .steps import Steps, distance, steps
from .word_tokenizer import WORDS, word_tokenizer

__all__ = ["path_name", "trial"]

# Low ids: high ones of some models are image tokens.
_WORDS = WORDS[:20]
_LETTERS = _WORDS[3:]
# Words of prompt and answers: longer than the windows of the small models; two batches.
_LENGTHS = ((12, 9, 15), (3, 17, 8), (1, 8, 11), (6, 2, 13), (10, 6, 5), (2, 14, 4))
# What a small model's windows and distances are, if its class packs any row.
_REACH, _SPREAD = 7, 5

Record = dict[str, Any]


def path_name(path: TrainingPath) -> str:
    """`packed`, `padded` with the fused head, or `plain`: padded, and the loss from logits."""
    return "plain" if path.head == "plain" else path.batches


def trial(name: str, measured: bool = True) -> list[Record]:
    """
    What is known about an architecture, a record for each of its cases.

    Args:
        name (`str`): Name of its configuration.
        measured (`bool`, *optional*): Train small models too, which takes most of the time.
    """
    model = configurations()[name][1].__name__
    found = []
    try:
        tried = list(cases(name))
    except Exception as bad:  # the default configuration
        return [{"name": name, "model": model, "case": "default", **_not_built(bad)}]
    for case, options in tried:
        record = {"name": name, "model": model, "case": case, "options": sorted(options)}
        try:
            record |= _tried(core(name, options), measured)
        except LookupError as bad:
            record |= _not_built(bad)
        found.append(record)
    return found


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0] if isinstance(error, LookupError) else _named(error, text)


def _named(error: BaseException, text: str) -> str:
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _not_built(error: BaseException) -> Record:
    return {"path": "not built", "why": _line(error)}


def _tried(model: Any, measured: bool) -> Record:
    try:
        path = path_of(model)
    except Exception as error:  # a model that cannot be trained
        return {"path": "refused", "why": _line(error)}
    record: Record = {"path": path_name(path), "why": "; ".join(path.reasons)}
    if record["path"] == "packed" and str(path.limits):
        record["limits"] = str(path.limits)
    if not measured:
        return record
    far = {"reach": LONGEST, "spread": MOST + 1} if "limits" in record else {}
    try:
        small: Any = small_model(model, **{"reach": _REACH, "spread": _SPREAD, **far})
    except NotSmall as error:
        return {**record, "untried": f"no small model: {error}"}
    del model
    return record | _measured(small, record["path"])


def _measured(small: Any, expected: str) -> Record:
    """The distances of losses and gradients from the plain path, for all weights and an adapter."""
    for parameter in small.parameters():  # the same values in both dtypes
        parameter.data = parameter.data.bfloat16().float()
    record: Record = {"float32": {}, "bfloat16": {}}
    for kind in ("full", "LoRA"):
        torch.manual_seed(1)
        try:
            model = small if kind == "full" else _adapted(small)
            plain = _run(model, use_fused_head=False)
            ours = _run(model)
            half = _in_bfloat16(model)
            theirs = _run(half, use_fused_head=False)
            with _decided(ours.path):
                mine = _run(half)
        except Exception as error:  # whatever the code of a model may raise
            record.setdefault("failed", {})[kind] = _line(error)
            continue
        taken = {path_name(each.path) for each in (ours, mine)}
        if taken != {expected}:
            record.setdefault("failed", {})[kind] = f"took the path {' and '.join(sorted(taken))}"
        record["float32"][kind] = _apart(ours, plain)
        record["bfloat16"][kind] = [_apart(mine, plain), _apart(theirs, plain)]
    return record


@contextmanager
def _decided(path: TrainingPath) -> Iterator[None]:
    """The decision about the same model in another dtype, which takes seconds."""

    def check(core: Any) -> model_packing.RowLimits:
        if path.padded_because is not None:
            raise model_packing.CannotPack(path.padded_because)
        return path.limits

    with mock.patch.object(model_packing, "check", check):
        yield


def _run(model: Any, **options: Any) -> Steps:
    return steps(model, _rows(), word_tokenizer(_WORDS), **options)


def _rows() -> Dataset:
    draw = torch.Generator().manual_seed(8)

    def text(count: int) -> str:
        ids = torch.randint(len(_LETTERS), (count,), generator=draw)
        return "".join(f"{_LETTERS[i]} " for i in ids.tolist())

    sides = ("prompt", "chosen", "rejected")
    return Dataset.from_list([dict(zip(sides, map(text, each))) for each in _LENGTHS])


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=False,  # not the neutral start
        task_type="CAUSAL_LM",
    )
    return get_peft_model(copy.deepcopy(model), config)


def _in_bfloat16(model: Any) -> Any:
    """A copy in `bfloat16`, as it is loaded: buffers and adapters keep their dtype."""
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return half


def _apart(one: Steps, other: Steps) -> float:
    """The largest distance of a step's loss or gradients."""
    losses = (
        distance({"": torch.tensor(mine)}, {"": torch.tensor(theirs)})
        for mine, theirs in zip(one.losses, other.losses, strict=True)
    )
    grads: zip[tuple[dict[str, Tensor], dict[str, Tensor]]] = zip(one.gradients, other.gradients)
    return max(*losses, *(distance(mine, theirs) for mine, theirs in grads))
