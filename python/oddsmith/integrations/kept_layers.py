"""Checkpointed layers that keep their activations, as many as a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .model_core import core_of
from .patch import Patch, Unsupported
from .saved_bytes import SavedBytes

__all__ = ["KeptLayers", "LayerStack", "is_checkpointed"]

_FUNCTION = "_gradient_checkpointing_func"
# Lengths that differ by less do not tell what grows with the length from what does not.
_APART = 1.2


class SavedRate:
    """
    The bytes a token that layers of one kind save: measured, and linear in the length of a row.

    Flash and packed attention save the same for each token; eager attention saves a row's length
    for each.
    """

    def __init__(self) -> None:
        # (length, bytes a token) of the shortest and the longest row that were measured.
        self._measured: list[tuple[int, float]] = []

    def add(self, tokens: int, length: int, saved: int) -> None:
        """A measured call: `saved` bytes for `tokens` in rows of `length`."""
        points = sorted([*self._measured, (length, saved / max(tokens, 1))])
        self._measured = points if len(points) < 2 else [points[0], points[-1]]

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._measured)

    def is_open(self, length: int) -> bool:
        """Whether a measurement of rows of `length` would tell more."""
        if len(self._measured) == 2:
            return length > _APART * self._measured[1][0]
        return not any(length < _APART * known < _APART**2 * length for known, _ in self._measured)

    def bytes(self, tokens: int, length: int) -> float | None:
        """Bytes that a call saves; an upper bound for lengths not measured, None without any."""
        if not self._measured:
            return None
        (short, low), (long, high) = self._measured[0], self._measured[-1]
        if length > long or short == long:
            # All of it may grow with the length.
            return high * tokens * max(1.0, length / long)
        slope = max(0.0, (high - low) / (long - short))
        return tokens * max(low + slope * (length - short), slope * length)


@dataclass
class LayerStack:
    """
    Layers that run one after the other, and how many of the last ones keep their activations.

    Those of the last layers are freed before an earlier layer is recomputed, so that together
    they cost the least.

    Args:
        rates (`list[SavedRate]`): Of each layer; layers of one kind share one.
        share (`float`): Part of the budget.
        budget (`Callable[[int], float]`): Bytes that may be kept in a batch of so many tokens.
    """

    rates: list[SavedRate]
    share: float
    budget: Callable[[int], float]
    #: Layers and bytes kept in the last batch, and the tokens of it.
    kept: tuple[int, float, int] = field(default=(0, 0.0, 0), init=False)

    def first_kept(self, tokens: int, length: int) -> int:
        """Index of the first layer that keeps its activations in a batch."""
        left = total = self.share * self.budget(tokens)
        first = len(self.rates)
        for rate in reversed(self.rates):
            needed = rate.bytes(tokens, length)
            if needed is None:
                # Kept once, to be measured; the last layer even without a budget. While a layer is
                # recomputed its activations are there too.
                if first == len(self.rates) or left > 0:
                    first -= 1
                break
            if needed > left:
                break
            left -= needed
            first -= 1
        self.kept = len(self.rates) - first, total - left, tokens
        return first


class _Function:
    """What a layer calls instead of its checkpointing function."""

    # Without a reference to the layer: models are copied and pickled in training.
    def __init__(self, original: Callable[..., Any], stack: LayerStack, index: int) -> None:
        self.original = original
        self._stack = stack
        self._index = index

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = next((each for each in args if isinstance(each, Tensor)), None)
        if hidden is None or hidden.dim() < 2:
            return self.original(forward, *args, **kwargs)
        tokens, length = hidden.numel() // max(hidden.shape[-1], 1), hidden.shape[-2]
        if self._index < self._stack.first_kept(tokens, length):
            return self.original(forward, *args, **kwargs)
        rate = self._stack.rates[self._index]
        if not rate.is_open(length):
            return forward(*args, **kwargs)
        with SavedBytes(_known(forward, args, kwargs)) as saved:
            out = forward(*args, **kwargs)
        # Without a graph, as without gradients or before the first adapter, nothing is saved.
        if _has_graph(out):
            rate.add(tokens, length, saved.total)
        return out


class KeptLayers(Patch):
    """
    Layers of a model keep their activations, instead of being recomputed, within a budget.

    What is computed is the same, to the bit. To be applied after checkpointing was enabled.

    Args:
        model (`nn.Module`): The model.
        budget (`Callable[[int], float]`):
            Bytes that all layers together may keep in a batch of so many tokens.
    """

    target = "checkpointing functions of a model's layers"
    purpose = "Memory that is free saves computing layers twice."
    tested = "torch 2.11, transformers 5.17 and 5.24"
    fallback = "activation_budget has no effect, and all layers are recomputed"

    def __init__(self, model: nn.Module, budget: Callable[[int], float]) -> None:
        super().__init__()
        self._model = model
        self._budget = budget
        self._changed: list[tuple[GradientCheckpointingLayer, _Function]] = []
        #: Those of the model; empty until the change is made.
        self.stacks: list[LayerStack] = []

    @property
    def layers(self) -> int:
        """Layers of the model that can keep their activations."""
        return sum(len(stack.rates) for stack in self.stacks)

    @property
    def kept_layers(self) -> int:
        """Layers that kept them in the last batch."""
        return sum(stack.kept[0] for stack in self.stacks)

    @property
    def kept_bytes(self) -> float:
        """Bytes that were kept in the last batch."""
        return sum(stack.kept[1] for stack in self.stacks)

    @property
    def tokens(self) -> int:
        """Tokens of the last batch."""
        return max((stack.kept[2] for stack in self.stacks), default=0)

    @property
    def is_measured(self) -> bool:
        """Whether it is known what the layers save."""
        return all(rate.is_known for stack in self.stacks for rate in stack.rates)

    def _check(self) -> None:
        if not any(True for _ in _checkpointed(core_of(self._model))):
            raise Unsupported(
                f"no layer of {type(core_of(self._model)).__name__} is a checkpointed "
                "GradientCheckpointingLayer"
            )

    def _change(self) -> None:
        core = core_of(self._model)
        folders: dict[str, list[GradientCheckpointingLayer]] = {}
        for name, layer in _checkpointed(core):
            folders.setdefault(name.rpartition(".")[0], []).append(layer)
        count = sum(map(len, folders.values()))
        rates: dict[Any, SavedRate] = {}
        self._changed, self.stacks = [], []
        for layers in folders.values():
            own = [rates.setdefault(_kind(layer), SavedRate()) for layer in layers]
            stack = LayerStack(own, len(layers) / count, self._budget)
            self.stacks.append(stack)
            for index, layer in enumerate(layers):
                function = _Function(getattr(layer, _FUNCTION), stack, index)
                setattr(layer, _FUNCTION, function)
                self._changed.append((layer, function))

    def _restore(self) -> None:
        for layer, function in self._changed:
            if vars(layer).get(_FUNCTION) is function:
                setattr(layer, _FUNCTION, function.original)
        self._changed = []

    def _is_there(self) -> bool:
        # Enabling checkpointing again replaces the functions.
        return all(vars(layer).get(_FUNCTION) is function for layer, function in self._changed)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether anything in a model is recomputed in the backward pass."""
    modules = core_of(model).modules()
    return any(getattr(module, "gradient_checkpointing", False) is True for module in modules)


def _has_graph(out: Any) -> bool:
    if isinstance(out, (tuple, list)):
        return any(_has_graph(each) for each in out)
    return isinstance(out, Tensor) and out.requires_grad


def _checkpointed(core: nn.Module) -> Iterator[tuple[str, GradientCheckpointingLayer]]:
    for name, module in core.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            if hasattr(module, _FUNCTION):
                yield name, module


def _kind(layer: nn.Module) -> Any:
    """Equal for layers that save as much."""
    parameters = tuple(
        (name, tuple(value.shape), value.dtype, value.requires_grad)
        for name, value in layer.named_parameters()
    )
    attention = tuple(str(getattr(layer, name, "")) for name in ("attention_type", "layer_type"))
    return type(layer), parameters, attention


def _known(forward: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Tensors that a layer is given, and its own: what it saves of them costs nothing."""
    given = [args, kwargs, getattr(forward, "args", ()), getattr(forward, "keywords", {})]
    while given:
        each = given.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, nn.Module):
            yield from chain(each.parameters(), each.buffers())
        elif isinstance(each, dict):
            given.extend(each.values())
        elif isinstance(each, (list, tuple)):
            given.extend(each)
    # In older transformers the layer is bound to the method.
    owner = getattr(getattr(forward, "func", forward), "__self__", None)
    if isinstance(owner, nn.Module):
        yield from chain(owner.parameters(), owner.buffers())
