"""LowRankOptimizer: options, steps and saved state that GaLore and APOLLO share."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import check_adam, check_not_captured, is_count, is_positive
from .layerwise import LayerwiseHooks
from .projection import PROJ_TYPES, project, sides
from .rules import norm_of, update_parameter
from .step import SLICES, LowRankStep, copied_state, is_stack, steps_of

logger = logging.getLogger(__name__)

# Most elements of projected gradients that are held before their update.
_BUCKET = 1 << 24


# Option of a projected group -> its default, a test of what is allowed, and what that is in words.
GroupOptions = dict[str, tuple[Any, Callable[[Any], bool], str]]


class LowRankOptimizer(Optimizer):
    """
    Base of the optimisers with moments of a projected gradient.

    Parameter groups with the key `rank` are projected; the others are updated in full. Subclasses
    define the update from a projected gradient in `_bases` and `_update_projected`, and the options
    of a group in `group_options`.

    If any element of a gradient is NaN or infinite, the step skips its parameter and state;
    `skipped` counts such parameters, and matrices of a stack by themselves.

    Args:
        params (`Iterable`): Parameters, or groups of them.
        defaults (`dict`): Options of groups that do not set them.
        core (`AdamWCore` or `AdafactorCore`): The update rule of a gradient.
        layerwise (`bool`): Update each parameter in the backward pass, as soon as its gradient is
            computed, and free the gradient; `step` does nothing then.
        accumulation_steps (`int`): Backward passes per update, for `layerwise`.
        is_last_backward (`Callable`, *optional*): Instead of a fixed number: returns whether the
            running backward pass is the last before an update.
        max_grad_norm (`float`, *optional*): For `layerwise`: largest norm of each parameter's
            gradient, or of its projected gradient. The norm of all gradients together is not known
            before the first one is freed.
        seed (`int`): Seed of the random matrices.

    Raises:
        ValueError: If an option is unknown or out of range, or a projected parameter is not a
            matrix or a stack of matrices.
    """

    # Whether a basis is computed from a gradient, which must not be zero then.
    needs_gradient = False

    # Whether layer-wise mode can accumulate projected gradients; otherwise full ones.
    adds_up_projected = True

    # Option of a projected group -> its default and a test of what is allowed.
    group_options: GroupOptions = {
        "rank": (None, lambda value: is_count(value), "a positive integer"),
        "update_proj_gap": (200, lambda value: is_count(value), "a positive integer"),
        "scale": (0.25, lambda value: is_positive(value), "a positive number"),
        "proj_type": ("std", lambda value: value in PROJ_TYPES, f"one of {PROJ_TYPES}"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        core: Any,
        *,
        layerwise: bool = False,
        accumulation_steps: int = 1,
        is_last_backward: Callable[[], bool] | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ):
        if not is_count(accumulation_steps):
            raise ValueError(f"accumulation_steps is {accumulation_steps!r}; must be positive")
        if max_grad_norm is not None and not (layerwise and is_positive(max_grad_norm)):
            raise ValueError(
                f"max_grad_norm is {max_grad_norm!r}; must be positive, and needs layerwise: "
                "elsewhere clip with torch.nn.utils.clip_grad_norm_"
            )
        if not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; must be an integer")
        check_adam(defaults)
        self.core = core
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.skipped: int = 0
        self._hooks: LayerwiseHooks | None = None
        super().__init__(params, defaults)
        if layerwise:
            self._hooks = LayerwiseHooks(self, accumulation_steps, is_last_backward)

    @property
    def layerwise(self) -> bool:
        """Whether parameters are updated in the backward pass."""
        return self._hooks is not None

    def pop_grad_norm(self) -> float:
        """In layer-wise mode, the norm of all gradients since the last call, before clipping."""
        return 0.0 if self._hooks is None else self._hooks.pop_norm()

    @property
    def layerwise_hooks(self) -> LayerwiseHooks | None:
        """The hooks of the layer-wise mode."""
        return self._hooks

    def close(self) -> None:
        """Removes the hooks of the layer-wise mode from the parameters."""
        if self._hooks is not None:
            self._hooks.detach()

    # ---- Groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See [`torch.optim.Optimizer.add_param_group`]; checks the options first."""
        param_group = self._checked_group(param_group)
        super().add_param_group(param_group)
        if self._hooks is not None:
            self._hooks.add(self.param_groups[-1])

    def _checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        name = type(self).__name__
        own = self.group_options
        known = {"params", "param_names", "initial_lr", *self.defaults, *own}
        if unknown := sorted(set(group) - known):
            raise ValueError(
                f"{name}: unknown options {', '.join(unknown)}; a group may have "
                f"{', '.join(sorted(set(self.defaults) | set(own)))}"
            )
        check_adam(group)
        if "rank" not in group:
            if present := sorted(set(group) & (set(own) - set(self.defaults))):
                raise ValueError(f"{name}: {', '.join(present)} without rank; give the rank too")
            return group
        defaults = {option: default for option, (default, _, _) in own.items()}
        group = {**defaults, **group}
        for option, (_, allowed, text) in own.items():
            if not allowed(group[option]):
                raise ValueError(f"{name}: {option} is {group[option]!r}; must be {text}")
        params = group["params"]
        # A generator would be empty after this loop.
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        for parameter in params:
            each = parameter[1] if isinstance(parameter, tuple) else parameter
            check_matrix(name, each)
        self._say_narrow(group)
        return group

    def _say_narrow(self, group: dict[str, Any]) -> None:
        """Logs one line about the matrices that are smaller than the rank."""
        params = [each[1] if isinstance(each, tuple) else each for each in group["params"]]
        shapes = [tuple(each.shape[-2:]) for each in params]
        narrow = [shape for shape in shapes if min(shape) < group["rank"]]
        if narrow:
            logger.warning(
                f"{type(self).__name__}: rank is {group['rank']}, more than a side of {len(narrow)} of "
                f"{len(params)} matrices, such as {narrow[0]}: each of them has the rank of its "
                "smaller side."
            )

    def _items(self) -> Iterator[LowRankStep]:
        """The parameters that have a gradient."""
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield from self.items_of(parameter, group, index)
                index += 1

    def items_of(self, parameter: Tensor, group: dict[str, Any], index: int) -> list[LowRankStep]:
        """The data for a step of a parameter with a gradient: several for a stack of matrices."""
        grad = parameter.grad
        if grad is None:
            raise ValueError(f"the parameter {tuple(parameter.shape)} has no gradient")
        if hasattr(parameter, "device_mesh"):  # split after it was added
            check_matrix(type(self).__name__, parameter)
        if grad.is_sparse:
            shape = tuple(parameter.shape)
            raise ValueError(f"the gradient of a parameter {shape} is sparse; must be dense")
        return steps_of(parameter, group, index, self.state[parameter], grad)

    # ---- Steps ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        One step; does nothing in layer-wise mode.

        Args:
            closure (`Callable`, *optional*): Computes the loss again and returns it.

        Raises:
            RuntimeError: While a CUDA graph is captured.
        """
        parameters = (each for group in self.param_groups for each in group["params"])
        check_not_captured(type(self).__name__, parameters)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layerwise:
            return loss
        items = list(self._items())
        bucket: list[LowRankStep] = []
        waiting = 0
        for item in items:
            bucket.append(item)
            waiting += self.low_numel(item) if item.projected else 0
            if waiting >= _BUCKET:
                self.step_items(bucket)
                bucket, waiting = [], 0
        self.step_items(bucket)
        return loss

    def low_shape(self, item: LowRankStep) -> tuple[int, int]:
        """Shape of a parameter's projected gradient."""
        rows, columns = item.parameter.shape
        left, right = sides(item.group["proj_type"], rows, columns)
        rank = item.rank
        return rank if left else rows, rank if right else columns

    def low_numel(self, item: LowRankStep) -> int:
        """Elements of a parameter's projected gradient."""
        return math.prod(self.low_shape(item))

    @torch.no_grad()
    def step_items(self, items: list[LowRankStep]) -> None:
        """Updates some parameters; layer-wise mode passes them one by one."""
        for item in items:
            item.state.setdefault("step", 0)
        refreshed = [item for item in items if item.projected and self.refresh_due(item)]
        left_out, zero = self._unfit(refreshed)
        for item in refreshed:
            if id(item) not in left_out | zero:
                self.refresh(item)
            elif id(item) in zero and not self._has_moments(item):
                left_out.add(id(item))  # no basis yet
        items = [item for item in items if id(item) not in left_out]
        for item in items:
            if item.projected:
                low = self.project(item)
                # Layer-wise mode may have projected the gradients of earlier micro-batches.
                item.low = low if item.low is None else item.low.add_(low)
        bad = self._not_finite(items)
        items = [item for item in items if id(item) not in bad]
        if self._hooks is not None:
            self._clip(items, self._hooks)
        by_group: dict[int, list[LowRankStep]] = defaultdict(list)
        for item in items:
            by_group[id(item.group)].append(item)
            if not self._has_moments(item):
                self.core.init(item.state, item.reduced, item.group)
        for same in by_group.values():
            group = same[0].group
            if "rank" in group:
                self._update_projected(same, group)
                continue
            for item in same:
                update_parameter(
                    self.core, item.parameter, item.grad, item.state, group, group["lr"]
                )

    def _has_moments(self, item: LowRankStep) -> bool:
        return not set(self.core.names).isdisjoint(item.state)

    def _unfit(self, items: list[LowRankStep]) -> tuple[set[int], set[int]]:
        """Ids of the items with a NaN or infinity in the gradient, and of those for whose basis it
        must not be zero, but is.
        """
        largest = _values([torch.linalg.vector_norm(item.grad, math.inf) for item in items])
        bad = {id(item) for item, value in zip(items, largest) if not math.isfinite(value)}
        zero = {id(item) for item, value in zip(items, largest) if value == 0.0}
        return self._counted(bad), zero if self.needs_gradient else set()

    def _not_finite(self, items: list[LowRankStep]) -> set[int]:
        """Ids of the items with a NaN or infinity in the gradient of their moments."""
        # A sum is finite if all terms are.
        sums = _values([item.reduced.sum(dtype=torch.float32) for item in items])
        return self._counted({id(item) for item, x in zip(items, sums) if not math.isfinite(x)})

    def _counted(self, bad: set[int]) -> set[int]:
        """`bad`; counts them and warns once."""
        if bad and not self.skipped:
            logger.warning(
                f"{type(self).__name__}: the gradient of {len(bad)} parameter(s) is NaN or "
                "infinite; they keep their values and state. Later ones are counted in `skipped`."
            )
        self.skipped += len(bad)
        return bad

    def _clip(self, items: list[LowRankStep], hooks: LayerwiseHooks) -> None:
        """In layer-wise mode, clips gradients, each separately, and records their norms."""
        for item in items:
            of_low = item.projected and self.adds_up_projected
            norm = norm_of(item.reduced if of_low else item.grad)
            hooks.norms.append(norm)
            if self.max_grad_norm is not None:
                factor = (self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
                for grad in (item.low, None if of_low else item.grad):
                    if grad is not None:
                        grad.mul_(factor)

    def refresh_due(self, item: LowRankStep) -> bool:
        """Whether the next step of a projected parameter begins with a new basis."""
        return item.state["step"] >= item.state.get("next_refresh", 0)

    def refresh(self, item: LowRankStep) -> None:
        """Computes a new basis from `item.grad`."""
        raise NotImplementedError

    def bases(self, item: LowRankStep) -> tuple[Tensor | None, Tensor | None]:
        """Left and right basis of a projected parameter."""
        raise NotImplementedError

    def project(self, item: LowRankStep) -> Tensor:
        """The projected gradient, `fp32`."""
        return project(item.grad, *self.bases(item))

    def _update_projected(self, items: list[LowRankStep], group: dict[str, Any]) -> None:
        """Updates parameters of one group from their projected gradients."""
        raise NotImplementedError

    def _directions(
        self, items: list[LowRankStep], group: dict[str, Any], lr: float
    ) -> list[Tensor]:
        """The core's updates from projected gradients: `-lr` times the normalised gradients."""
        targets = [torch.zeros_like(item.reduced) for item in items]
        self.core.update(
            targets,
            [item.reduced for item in items],
            [item.state for item in items],
            [item.parameter for item in items],
            group,
            lr,
        )
        return targets

    # ---- Saved state ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restores a `state_dict`; tensors move to the devices of the parameters and keep their
        dtypes.

        Raises:
            ValueError: If groups, ranks or shapes differ; nothing is changed then.
        """
        states = self._checked_state(state_dict)
        # torch would cast every tensor to the dtype of its parameter.
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, state in states:
            self.state[parameter] = state = copied_state(state, parameter.device)
            for part in state.get(SLICES, [state]):
                self.core.loaded(part)

    def _checked_state(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        name = type(self).__name__
        saved_groups = state_dict["param_groups"]
        here, there = len(self.param_groups), len(saved_groups)
        if here != there:
            raise ValueError(f"{name}: the state has {there} parameter groups; must be {here}")
        states = []
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups)):
            here, there = len(group["params"]), len(saved["params"])
            if here != there:
                raise ValueError(f"{name}: group {number} has {there} parameters; must be {here}")
            for option in ("rank", "proj_type"):
                if group.get(option) != saved.get(option):
                    raise ValueError(
                        f"{name}: group {number} was saved with {option} {saved.get(option)!r}; "
                        f"it is {group.get(option)!r} here"
                    )
            for parameter, key in zip(group["params"], saved["params"]):
                if key in state_dict["state"]:
                    state = dict(state_dict["state"][key])
                    here = len(parameter) if is_stack(parameter, group) else None
                    there = len(state[SLICES]) if SLICES in state else None
                    if state and here != there:
                        raise ValueError(
                            f"{name}: state of parameter {key} has {there} slices; must be {here}"
                        )
                    like = torch.empty_like(parameter, device="meta")
                    for item in steps_of(like, group, 0, state, like):
                        if item.state.get("step", 0):
                            self._check_shapes(item, f"{name}: state of parameter {key}")
                    states.append((parameter, state))
        return states

    def _check_shapes(self, item: LowRankStep, where: str) -> None:
        expected: dict[str, Any] = {}
        shape = self.low_shape(item) if item.projected else item.parameter.shape
        self.core.init(expected, torch.empty(shape, device="meta"), item.group)
        shapes = {key: tuple(value.shape) for key, value in expected.items()}
        shapes |= self.basis_shapes(item) if item.projected else {}
        for key, shape in shapes.items():
            found = item.state.get(key)
            if not isinstance(found, Tensor) or tuple(found.shape) != shape:
                found = tuple(found.shape) if isinstance(found, Tensor) else found
                raise ValueError(f"{where}: {key} is {found}; must have shape {shape}")

    def basis_shapes(self, item: LowRankStep) -> dict[str, tuple[int, int]]:
        """Shapes of the saved bases, by their names in the state."""
        return {}


def _values(tensors: list[Tensor]) -> list[float]:
    """The values of tensors with one element: one wait for the device, not one for each."""
    if not tensors:
        return []
    return torch.stack([each.float().to(tensors[0].device) for each in tensors]).tolist()


def check_matrix(where: str, parameter: Tensor, name: str | None = None) -> None:
    """Refuses parameters that cannot be projected.

    Raises:
        ValueError: If the parameter is sharded, or is not a matrix or a stack of matrices.
    """
    name = "a parameter" if name is None else name
    if hasattr(parameter, "device_mesh"):
        raise ValueError(
            f"{where}: {name} is split over processes (FSDP2 or tensor parallel); a projection "
            "needs full matrices: use DDP, or an element-wise optimizer such as adamw_8bit"
        )
    if parameter.dim() not in (2, 3):
        raise ValueError(
            f"{where}: {name} has shape {tuple(parameter.shape)}; only matrices, and stacks of them, "
            "can be projected (FSDP flattens them: use DDP)"
        )
    if not parameter.is_floating_point():
        raise ValueError(f"{where}: {name} is {parameter.dtype}; must be floating point")
