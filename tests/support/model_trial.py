"""One architecture tried out: the path of its batches, and how far two steps are from the plain path."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor, nn

from oddsmith.integrations import model_packing
from oddsmith.integrations.model_path import TrainingPath, path_of
from oddsmith.integrations.small_model import NotSmall, small_model

from .architectures import cases, classes, core
from .double import stay_in_double
from .steps import Steps, distance, steps
from .word_tokenizer import WORDS, word_tokenizer

__all__ = ["DOUBLE", "EXACT", "differs", "differs_in_half", "path_name", "trial"]

#: Distances in `float32` above this are looked at in `float64`, too.
EXACT = 1e-5
#: There, more than this would be another result.
DOUBLE = 1e-9
# Weights that a model is tried with if the first ones leave doubt.
_DRAWS = 5

# Low ids: high ones of some models are image tokens.
_WORDS = WORDS[:20]
_LETTERS = _WORDS[3:]
# Words of prompt and answers: longer than the windows of the small models; two batches.
_LENGTHS = ((12, 9, 15), (3, 17, 8), (1, 8, 11), (6, 2, 13), (10, 6, 5), (2, 14, 4))
# What a small model's windows and distances are, if its class packs any row.
_REACH, _SPREAD = 7, 5
# The same if its class packs rows up to a limit: more tokens than the batches have.
_FAR = 1000

Record = dict[str, Any]


def path_name(path: TrainingPath) -> str:
    """`packed`, `padded` with the fused head, or `plain`: padded, and the loss from logits."""
    return "plain" if path.head == "plain" else path.batches


def differs(record: Record) -> bool:
    """Whether the results of a trial are others than those of the plain path."""
    exact, double = record.get("float32", {}), record.get("float64", {})
    if any(not each <= EXACT and kind not in double for kind, each in exact.items()):
        return True
    if any(not each <= DOUBLE for each in double.values()):
        return True
    return any(differs_in_half(*each) for each in record.get("bfloat16", {}).values())


def trial(name: str, measured: bool = True) -> list[Record]:
    """
    What is known about an architecture, a record for each of its cases.

    Args:
        name (`str`): Name of its configuration.
        measured (`bool`, *optional*): Train small models too, which takes most of the time.
    """
    model = classes(name)[1].__name__
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
    return text if isinstance(error, LookupError) else _named(error, text)


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
    far: dict[str, Any] = {"reach": _FAR, "spread": _FAR} if "limits" in record else {}
    try:
        small: Any = small_model(model, **{"reach": _REACH, "spread": _SPREAD, **far})
    except NotSmall as error:
        return {**record, "untried": f"no small model: {error}"}
    del model
    return record | _measured(small, path)


def _measured(small: Any, path: TrainingPath) -> Record:
    """The distances of losses and gradients from the plain path, for all weights and an adapter."""
    record: Record = {"float32": {}, "bfloat16": {}}
    for kind in ("full", "LoRA"):
        try:
            model = _drawn(small, kind, 0)
            truth, ours = _plain(model), _ours(model, path)
            record["float32"][kind] = _apart(ours, truth)
            record["bfloat16"][kind] = half = _half(model, truth, path)
        except Exception as error:  # whatever the code of a model may raise
            record.setdefault("failed", {})[kind] = _line(error)
            continue
        if not record["float32"][kind] <= EXACT:
            try:
                record.setdefault("float64", {})[kind] = _in_float64(model, path)
            except Exception as error:  # of code that knows no float64
                record.setdefault("failed", {})[f"{kind}, float64"] = _line(error)
        if differs_in_half(*half):
            # Rounding is random, and the second step amplifies it: with other weights, it is not the
            # same path that is farther off.
            draws = [half]
            for seed in range(1, _DRAWS):
                model = _drawn(small, kind, seed)
                draws.append(_half(model, _plain(model), path))
            record["bfloat16"][kind] = tuple(map(median, zip(*draws, strict=True)))
    return record


def _drawn(small: Any, kind: str, seed: int) -> Any:
    """A copy of a small model with weights that `bfloat16` has; for other seeds in another order."""
    torch.manual_seed(1 + seed)
    model = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in model.parameters():  # the same values in both dtypes
            if seed and parameter.ndim > 1:
                order = torch.randperm(parameter.numel())
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
            parameter.copy_(parameter.bfloat16())
    return model if kind == "full" else _adapted(model)


def _half(model: Any, truth: Steps, path: TrainingPath) -> tuple[float, float]:
    """In `bfloat16`: the distances of ours and of the plain path from the plain one in `float32`."""
    half = _in_bfloat16(model)
    try:
        theirs = _plain(half)
    except RuntimeError:  # buffers that loading makes in the dtype of the weights
        for buffer in half.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.bfloat16()
        theirs = _plain(half)
    return _apart(_ours(half, path), truth), _apart(theirs, truth)


def differs_in_half(ours: float, plain: float) -> bool:
    """Whether one path is farther from the truth than the rounding of the other."""
    return not ours <= 2.0 * plain + 1e-2


def _in_float64(model: Any, path: TrainingPath) -> float:
    """The distance that is left where rounding is far smaller."""
    wide = copy.deepcopy(model).double()
    core = wide.get_base_model() if hasattr(wide, "get_base_model") else wide
    if hasattr(core, "set_experts_implementation"):
        core.set_experts_implementation("eager")  # others know no float64
    return _apart(_ours(wide, path, stay_in_double), _plain(wide, stay_in_double))


def _plain(model: Any, around: Any = nullcontext) -> Steps:
    return steps(model, _rows(), word_tokenizer(_WORDS), around, use_fused_head=False)


def _ours(model: Any, path: TrainingPath, around: Any = nullcontext) -> Steps:
    """On the path that the architecture has; to try it out again would take most of the time."""

    def check(core: Any) -> model_packing.RowLimits:
        if path.padded_because is not None:
            raise model_packing.CannotPack(path.padded_because)
        return path.limits

    with mock.patch.object(model_packing, "check", check):
        found = steps(model, _rows(), word_tokenizer(_WORDS), around)
    if found.path != path:
        raise ValueError(f"another path: {found.path}")
    return found


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
        target_modules=_targets(model),
        init_lora_weights=False,  # not the neutral start
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _targets(model: Any) -> Any:
    """
    The linear layers that peft can adapt. Its `all-linear` has routers that return more than a tensor,
    and layers of a state-space model, which it then refuses.
    """
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not name.endswith("out_proj")
    ]
    return linear or "all-linear"


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
