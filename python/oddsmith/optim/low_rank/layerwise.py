"""Layer-wise mode: updates parameters in the backward pass and frees their gradients."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer
    from .step import LowRankStep

# Parameter -> whose hook it has, and its handle: a second optimiser on a model replaces the first.
_HANDLES = WeakTensorKeyDictionary()


class LayerwiseHooks:
    """
    Hooks that pass each gradient to an optimiser as soon as it is computed.

    Between the micro-batches of an update, GaLore accumulates projected gradients, so that full
    gradients of projected parameters are freed in each backward pass. In a step with a new basis
    the full gradients are kept until the last micro-batch, because the basis depends on their sum;
    with `refresh_on="first"` the basis is that of the first micro-batch, and they are freed.

    Args:
        optimizer (`LowRankOptimizer`): Updates the parameters.
        accumulation_steps (`int`): Backward passes per update.
        is_last_backward (`Callable`, *optional*): Returns whether the running backward pass is the
            last before an update, instead of a fixed number.
    """

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        accumulation_steps: int,
        is_last_backward: Callable[[], bool] | None,
    ):
        self._optimizer = weakref.ref(optimizer)
        self._accumulation_steps = accumulation_steps
        self._is_last_backward = is_last_backward
        self._passes: Counter[int] = Counter()
        self._low: dict[tuple[int, ...], Tensor] = {}
        self.norms: list[Tensor] = []
        self._places: dict[int, tuple[dict[str, Any], int]] = {}
        self.attached = False
        for group in optimizer.param_groups:
            self.add(group)

    def add(self, group: dict[str, Any]) -> None:
        """Adds hooks to the parameters of a group."""
        hooks = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            if (alive := hooks()) is not None:
                alive.take(parameter)

        for parameter in group["params"]:
            self._places[id(parameter)] = (group, len(self._places))
            if parameter in _HANDLES:
                _HANDLES.pop(parameter)[1].remove()
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(hook)
                _HANDLES[parameter] = hooks, handle
        self.attached = True

    def attach(self) -> None:
        """Adds the hooks again after [`detach`]."""
        if not self.attached:
            for group in self._groups():
                self.add(group)

    def detach(self) -> None:
        """Removes the hooks; those of another optimiser on the same parameters are kept."""
        self.attached = False
        for group in self._groups():
            for parameter in group["params"]:
                if parameter in _HANDLES:
                    owner, handle = _HANDLES[parameter]
                    if owner() is self:
                        del _HANDLES[parameter]
                        handle.remove()

    @staticmethod
    def detach_others(parameters: Iterable[Tensor], own: LayerwiseHooks | None) -> None:
        """Detaches every optimiser but `own` from these parameters: it would free their gradients."""
        for parameter in parameters if _HANDLES else ():
            owner = _HANDLES[parameter][0]() if parameter in _HANDLES else None
            if owner is not None and owner is not own:
                owner.detach()

    def _groups(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        return [] if optimizer is None else optimizer.param_groups

    def _is_last(self, parameter: Tensor) -> bool:
        if self._is_last_backward is not None:
            return self._is_last_backward()
        self._passes[id(parameter)] += 1
        return self._passes[id(parameter)] >= self._accumulation_steps

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """Accumulates a parameter's gradient or, with the last one, updates the parameter."""
        optimizer = self._optimizer()
        if optimizer is None or parameter.grad is None:
            return
        # load_state_dict replaces the groups' dictionaries.
        group, index = self._place(optimizer, parameter)
        items = optimizer.items_of(parameter, group, index)
        if self._is_last(parameter):
            self._passes.pop(id(parameter), None)
            for item in items:
                item.low = self._low.pop(item.place, None)
            optimizer.step_items(items)
            parameter.grad = None
        elif optimizer.adds_up_projected and items[0].projected:
            done = [self._add_up(optimizer, item) for item in items]
            if all(done):
                parameter.grad = None

    def _place(self, optimizer: LowRankOptimizer, parameter: Tensor) -> tuple[dict[str, Any], int]:
        place = self._places.get(id(parameter))
        if place is None or not any(place[0] is group for group in optimizer.param_groups):
            index = 0
            for group in optimizer.param_groups:
                for each in group["params"]:
                    self._places[id(each)] = (group, index)
                    index += 1
            place = self._places[id(parameter)]
        return place

    def _add_up(self, optimizer: LowRankOptimizer, item: LowRankStep) -> bool:
        """Whether the gradient of a matrix is no longer needed; it is then zero."""
        item.state.setdefault("step", 0)
        if optimizer.refresh_due(item):
            largest = float(torch.linalg.vector_norm(item.grad, math.inf))
            if item.group["refresh_on"] == "all" or not 0.0 < largest < math.inf:
                return False  # keep the gradient; autograd adds to it
            optimizer.refresh(item)
        low = optimizer.project(item)
        key = item.place
        if key in self._low:
            self._low[key].add_(low)
        else:
            self._low[key] = low
        if len(key) > 1:  # of a stack, whose other matrices may still need theirs
            item.grad.zero_()
        return True

    def pop_norm(self) -> float:
        """Norm of all gradients since the last call."""
        norms, self.norms = self.norms, []
        if not norms:
            return 0.0
        first = norms[0].device
        return float(torch.linalg.vector_norm(torch.stack([each.to(first) for each in norms])))
