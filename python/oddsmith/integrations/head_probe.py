"""Finds out by a trial what a model does between its head's input and its logits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .model_core import observed
from .model_structure import is_sharded, strange
from .module_forward import ModuleForward
from .small_model import NotSmall, small_model

# Names of a bound on the logits, or a factor, in transformers' configurations. Some models multiply
# where others divide, or use the value elsewhere: the probe decides, not the name.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
_SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "output_multiplier_scale",
)
_POSITIONS = 3
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadMismatch(Exception):
    """The loss cannot be computed in a model's head. The message is the reason."""


class LogitMap(NamedTuple):
    """Logits of a head's output z: `softcap * tanh(scale * z / softcap)`, or `scale * z`."""

    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def find_head(core: Any) -> nn.Module:
    """
    The linear layer that makes a model's logits, without its wrappers; peft's layer in its place, if
    some rows of its weight are trained. [`head_weight`] has its weight.

    Raises:
        [`HeadMismatch`]: If there is none.
    """
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    while head is not None:
        if hasattr(head, "modules_to_save"):  # PEFT's wrapper of a layer that is trained in full
            active = [name for name in head.active_adapters if name in head.modules_to_save]
            whole = head.disable_adapters or not active
            head = head.original_module if whole else head.modules_to_save[active[0]]
        elif hasattr(head, "_fsdp_wrapped_module"):
            head = head._fsdp_wrapped_module
        elif hasattr(head, "token_adapter"):  # PEFT's wrapper of a layer with trained rows
            head = head.token_adapter
        elif hasattr(head, "trainable_tokens_delta") and not _trained_rows(head):
            head = head.base_layer
        else:
            break
    if head is None:
        raise HeadMismatch(f"{type(core).__name__} has no output embeddings")
    linear: Any = head.base_layer if _trained_rows(head) else head
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise HeadMismatch(
            f"its output head is a {type(linear).__module__}.{type(linear).__name__}, not a "
            "torch.nn.Linear"
        )
    if linear is not head and linear.bias is not None:
        raise HeadMismatch("its output head has trained rows and a bias, which peft leaves out")
    if linear.weight.dtype not in _FLOATS:
        raise HeadMismatch(f"its output head has dtype {linear.weight.dtype}")
    return head


def _trained_rows(head: Any) -> list[str]:
    """The active adapters that train rows of a head's weight, if they are not merged into it."""
    if not hasattr(head, "trainable_tokens_delta") or head.disable_adapters or head.merged:
        return []
    return list(head.active_adapters)


def head_weight(head: Any) -> Tensor:
    """The weight of a head: `(vocabulary, hidden size)`, with the rows that adapters train."""
    rows = _trained_rows(head)
    return head.get_merged_weights(rows) if rows else head.weight


def head_bias(head: Any) -> Tensor | None:
    """The bias of a head."""
    return None if _trained_rows(head) else head.bias


def head_size(head: Any) -> tuple[int, int]:
    """Rows and columns of a head's weight, `(vocabulary, hidden size)`.

    Those of the weight itself, because peft makes the layer that it trains for a tied head with
    `in_features` and `out_features` exchanged; those of the layer if its weight is sharded.
    """
    layer = head.base_layer if _trained_rows(head) else head
    if layer.weight.dim() == 2 and layer.weight.numel():
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.out_features, layer.in_features


def probe_head(core: Any) -> LogitMap:
    """
    Find out how a model makes logits from its head's output, by giving it a known output.

    The values are much larger than real logits, so that a softcap is visible. If the model's body
    can be replaced for the probe, no weights are used, so it works for weights that are offloaded
    or not loaded yet, and is fast for large ones. Otherwise the model runs on three tokens. Of a
    model with sharded weights, whose hooks would gather them, a small model of its class runs.

    Raises:
        [`HeadMismatch`]: If no softcap and scale in the configuration explain the logits.
    """
    head = find_head(core)
    if (getattr(core, "tp_size", None) or 1) > 1:
        raise HeadMismatch("its output head is split by tensor parallelism")
    if is_sharded(core):
        if _trained_rows(head):
            raise HeadMismatch("its output head is split over processes, and some rows are trained")
        core = _small(core)
        head = find_head(core)
    known, logits = _probed(core, head)
    if logits.shape != known.shape:
        raise HeadMismatch(
            f"it makes logits of shape {tuple(logits.shape)} from {tuple(known.shape)}"
        )
    tolerance = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    for candidate in _candidates(core):
        expected = candidate(known.double())
        if (logits.double() - expected).abs().max() <= tolerance * expected.abs().max():
            return candidate
    raise HeadMismatch("it changes its head's output by more than the known softcap or scale")


def _probed(core: Any, head: Any) -> tuple[Tensor, Tensor]:
    """A known output of a head, and the logits that its model makes of it."""
    device = head_weight(head).device
    device = torch.device("cpu") if device.type == "meta" else device
    steps = _POSITIONS * head_size(head)[0]
    known = torch.linspace(-150.0, 150.0, steps, device=device).view(1, _POSITIONS, -1)
    failure: Exception | None = None
    for stubbed in (True, False):
        try:
            return known, _logits_for(core, head, known, stubbed)
        except HeadMismatch:
            raise
        except Exception as error:  # the code of a model can raise anything
            failure = error
    if all(p.device.type == "meta" for p in core.parameters()):  # no weights, so it cannot run
        small = _small(core, "its weights are not loaded")
        return _probed(small, find_head(small))
    raise HeadMismatch(f"it could not be probed ({type(failure).__name__}: {failure})")


def _small(core: Any, why: str = "its weights are sharded") -> Any:
    try:
        small = small_model(core)
    except NotSmall as none:
        raise HeadMismatch(
            f"{why}, and a small model of its class cannot be built ({none})"
        ) from none
    odd = strange(core, small)
    if odd is not None:
        raise HeadMismatch(f"{why}, and {odd}")
    return small


def _candidates(core: Any) -> Iterator[LogitMap]:
    config = core.config
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = (getattr(each, name, None) for each in configs for name in names)
        return [float(x) for x in found if isinstance(x, (int, float)) and x and x > 0]

    scales = numbers(_SCALES)
    for scale in [1.0, *scales, *(1.0 / x for x in scales)]:
        for softcap in [None, *numbers(_SOFTCAPS)]:
            yield LogitMap(softcap, scale)


class _Body(tuple[Tensor]):
    """Output of a model's body: the hidden states by position or name, None for other names."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


@torch.no_grad()
def _logits_for(core: Any, head: Any, known: Tensor, stubbed: bool) -> Tensor:
    """The model's logits if its head's output is `known`."""
    calls: list[tuple[int, ...]] = []

    def forward(hidden: Tensor) -> Tensor:
        calls.append(tuple(hidden.shape))
        return known

    # Low ids: high ones of multimodal models can be image tokens.
    vocabulary, hidden_size = head_size(head)
    ids = torch.arange(_POSITIONS, device=known.device)[None] % vocabulary
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with ModuleForward(head, forward):
        if stubbed:
            body = getattr(core, "base_model", core)
            if body is core:
                raise TypeError("the model has no separate body")
            width = getattr(core.config.get_text_config(), "hidden_size", hidden_size)
            dtype = head_weight(head).dtype
            hidden = torch.zeros(1, _POSITIONS, width, device=known.device, dtype=dtype)
            stub = ModuleForward(body, lambda *args, **kwargs: _Body((hidden,)), under_hooks=False)
            with stub:
                outputs = core(**inputs)
        else:
            with observed(core):
                outputs = core(**inputs)
    if calls != [(1, _POSITIONS, hidden_size)]:
        raise HeadMismatch(
            f"it called its head with {calls or 'nothing'}; must be once with all positions"
        )
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits
