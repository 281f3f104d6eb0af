"""BlockAdamW: the base of AdamW with 8-bit and with paged moments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import check_adam, check_not_captured, is_count
from . import saved_state
from .fsdp import gathered, local, local_grad, split
from .moments import is_8bit, layout, maps
from .pages import FilePages, PinnedPages
from .staging import Staged, slot_capacity
from .step import AdamUpdate, NonFinite, adamw_step, rule_of

logger = logging.getLogger(__name__)

# Bytes of a GPU's memory through which paged state passes.
DEVICE_BUDGET = 256 << 20

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Options of a group that are restored from a saved state. The number of bits is not: a run can
# continue with another of these optimisers.
_LOADED = ("lr", "betas", "eps", "weight_decay", "stochastic_rounding", "initial_lr")


class BlockAdamW(Optimizer):
    """
    AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in one pass over all parameters.

    Base of [`AdamW8bit`], [`PagedAdamW8bit`] and [`PagedAdamW32bit`].

    If an element of a gradient is NaN or infinite, its parameter is kept and its moments are reset;
    `nonfinite` counts such elements.

    `state_dict` has bitsandbytes' layout. `load_state_dict` accepts states of either, with moments
    of 8 or 32 bits, and converts them if necessary. The state of a parameter that FSDP2 has split
    is saved in 32 bits, so that it can be gathered and split again; this is lossless.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        seed: int = 0,
        pages: FilePages | None = None,
        device_budget: int = DEVICE_BUDGET,
    ):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed is {seed!r}; must be an integer")
        if not is_count(device_budget):
            raise ValueError(
                f"device_budget is {device_budget!r}; must be a positive number of bytes"
            )
        slot_capacity(device_budget)  # fail here, not in the first step
        check_adam(defaults)
        self.seed = seed
        self._pages = pages
        self._device_budget = device_budget
        self._staged: dict[torch.device, Staged] = {}
        self._bad = NonFinite()
        self._reported = False
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # Attributes that torch does not copy; a copy allocates its buffers again.
        self._synchronize()
        own = ("seed", "_pages", "_device_budget", "_bad", "_reported")
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in own},
            "_staged": {},
        }

    # ---- Groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See [`torch.optim.Optimizer.add_param_group`]; checks the options first."""
        name = type(self).__name__
        known = {"params", "param_names", "initial_lr", *self.defaults}
        if unknown := sorted(set(param_group) - known):
            raise ValueError(
                f"{name}: unknown options {', '.join(unknown)}; a group may have "
                f"{', '.join(sorted(self.defaults))}"
            )
        options = {**self.defaults, **param_group}
        check_adam(options)
        if options["optim_bits"] not in (8, 32):
            raise ValueError(f"{name}: optim_bits is {options['optim_bits']!r}; must be 8 or 32")
        if not is_count(options["min_8bit_size"]):
            got = options["min_8bit_size"]
            raise ValueError(f"{name}: min_8bit_size is {got!r}; must be a positive integer")
        if not isinstance(options["stochastic_rounding"], bool):
            got = options["stochastic_rounding"]
            raise ValueError(f"{name}: stochastic_rounding is {got!r}; must be True or False")
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for each in params:
            parameter = each[1] if isinstance(each, tuple) else each
            if isinstance(parameter, Tensor):
                self._check_dtype(parameter)
        places = options["full_precision"]
        if not all(isinstance(each, int) and 0 <= each < len(params) for each in places):
            raise ValueError(
                f"{name}: full_precision is {places!r}; must be places in the group's {len(params)} "
                "parameters"
            )
        super().add_param_group({**param_group, "params": params})

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _check_dtype(self, parameter: Tensor) -> None:
        if parameter.dtype not in _DTYPES:
            raise ValueError(
                f"{type(self).__name__}: a parameter of shape {tuple(parameter.shape)} is "
                f"{parameter.dtype}; must be float32, bfloat16 or float16"
            )

    def _bits(self, parameter: Tensor, group: dict[str, Any]) -> int:
        large = local(parameter).numel() >= group["min_8bit_size"]
        full = any(parameter is group["params"][place] for place in group["full_precision"])
        return 8 if group["optim_bits"] == 8 and large and not full else 32

    # ---- Steps ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        One step of all parameters that have a gradient.

        Args:
            closure (`Callable`, *optional*): Computes the loss again and returns it.

        Raises:
            RuntimeError: If the state is paged, in a process that was forked after it was made; while a CUDA
                graph is captured.
        """
        if self._pages is not None:
            self._pages.check_process()
        check_not_captured(type(self).__name__, self._parameters())
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = []
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # It may have been cast after it was added.
                    self._check_dtype(parameter)
                    if parameter.grad.is_sparse:
                        shape = tuple(parameter.shape)
                        raise ValueError(
                            f"the gradient of a parameter {shape} is sparse; must be dense"
                        )
                    found.append((parameter, group, index))
                index += 1
        # Everything that can fail comes before the first change.
        self._allocate([(parameter, group) for parameter, group, _ in found])
        updates, copies = [], []
        for parameter, group, index in found:
            state = self.state[parameter]
            number = state["step"] + 1
            value, grad = local(parameter), local_grad(parameter)
            if not value.is_contiguous():
                copies.append((value, value.contiguous()))
                value = copies[-1][1]
            if grad.dtype != value.dtype:
                grad = grad.float()
            seed = self._draw(index, number) if group["stochastic_rounding"] else None
            rule = rule_of(group, number)
            updates.append(AdamUpdate(value, grad.contiguous(), state, rule, seed))
        self._run(updates)
        for value, moved in copies:
            value.copy_(moved)
        # After everything that can fail, such as an allocation, so that a step that failed can be taken again.
        for parameter, _, _ in found:
            self.state[parameter]["step"] += 1
        if all(update.value.device.type == "cpu" for update in updates):
            self.report()
        return loss

    def _run(self, updates: list[AdamUpdate]) -> None:
        here = []
        away: dict[torch.device, list[AdamUpdate]] = {}
        for update in updates:
            same = update.state["state1"].device == update.value.device
            (here if same else away.setdefault(update.value.device, [])).append(update)
        adamw_step(here, self._bad)
        for device, some in away.items():
            self._staged[device].step(some, self._bad)

    def _draw(self, index: int, step: int) -> int:
        """Seed of a parameter's step, 32 bits; the kernel derives its random numbers from it."""
        mixed = (
            self.seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB
        )
        return (mixed % (1 << 64)) >> 32

    @property
    def nonfinite(self) -> int:
        """Gradient elements that were NaN or infinite so far; reading it waits for a GPU."""
        return self._bad.total()

    def report(self) -> None:
        """Warns once about NaN or infinite gradients."""
        if not self._reported and (count := self.nonfinite):
            self._reported = True
            logger.warning(
                f"{type(self).__name__}: {count} element(s) of the gradients were NaN or infinite; their "
                "parameters were kept. Later ones are counted in `nonfinite`."
            )

    # ---- State ----

    def _allocate(self, found: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Creates missing states, zeros on the parameter's device or in pages."""
        fresh: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for parameter, group in found:
            state, device = self.state.get(parameter), local(parameter).device
            if self._home(device) != device and device not in self._staged:
                self._staged[device] = Staged(device, self._device_budget)
            if not state:
                fresh.setdefault(device, []).append((parameter, group))
            elif state["state1"].device != self._home(device):
                self._move(parameter, state)
        for device, some in fresh.items():
            layouts = [
                layout(local(parameter).shape, self._bits(parameter, group))
                for parameter, group in some
            ]
            entries = [entry for each in layouts for entry in each.values()]
            tensors = iter(self._zeros(entries, device))
            for (parameter, _), each in zip(some, layouts):
                state = {"step": 0, **{key: next(tensors) for key in each}}
                if is_8bit(state):
                    state |= self._maps(state["state1"].device)
                self.state[parameter] = state

    def _maps(self, device: torch.device) -> dict[str, Tensor]:
        return dict(zip(("qmap1", "qmap2"), maps(device)))

    def _home(self, device: torch.device) -> torch.device:
        """Where the state of parameters on a device is."""
        paged = self._pages is not None and device.type == "cuda"
        return torch.device("cpu") if paged else device

    def _zeros(self, entries: list[Any], device: torch.device) -> list[Tensor]:
        if self._pages is None:
            return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in entries]
        pages = self._pages if device.type == "cpu" else PinnedPages()
        return pages.allocate(entries)

    def _move(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Moves a state to its parameter's device."""
        self._synchronize()
        self.state[parameter] = self._placed([(local(parameter).device, state)])[0]

    def _placed(self, states: list[tuple[torch.device, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Copies of states, on their parameters' devices or in pages."""
        placed = [dict(state) for _, state in states]
        by_device: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
        for (device, _), copy in zip(states, placed):
            for key in copy:
                if isinstance(copy[key], Tensor) and not key.startswith("qmap"):
                    by_device.setdefault(device, []).append((copy, key))
        for device, some in by_device.items():
            entries = [(tuple(copy[key].shape), copy[key].dtype) for copy, key in some]
            for (copy, key), room in zip(some, self._zeros(entries, device)):
                copy[key] = room.copy_(copy[key])
        for (device, _), copy in zip(states, placed):
            if is_8bit(copy):
                copy |= self._maps(self._home(device))
        return placed

    def _synchronize(self) -> None:
        for staged in self._staged.values():
            staged.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """See [`torch.optim.Optimizer.state_dict`]; in bitsandbytes' layout."""
        self._synchronize()
        found = super().state_dict()
        parameters = [each for group in self.param_groups for each in group["params"]]
        states = {}
        for key, state in found["state"].items():
            parameter = parameters[key] if isinstance(key, int) else key
            states[key] = gathered(parameter, state) or saved_state.wrap(state)
        return {**found, "state": states}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restores a `state_dict` of this optimiser or of bitsandbytes' AdamW.

        Raises:
            ValueError: If groups or shapes differ; nothing is changed then.
            OSError: If the state is paged and the disk is full; nothing is changed then.
        """
        if self._pages is not None:
            self._pages.check_process()
        name = type(self).__name__
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if len(groups) != len(saved_groups):
            raise ValueError(
                f"{name}: {len(saved_groups)} groups were saved; there are {len(groups)}"
            )
        parameters, states = [], []
        for number, (group, other) in enumerate(zip(groups, saved_groups)):
            here, there = len(group["params"]), len(other["params"])
            if here != there:
                raise ValueError(f"{name}: group {number} has {there} parameters; must be {here}")
            for parameter, key in zip(group["params"], other["params"]):
                if state := state_dict["state"].get(key):
                    own = local(parameter)
                    state = {k: split(parameter, v) for k, v in saved_state.unwrap(state).items()}
                    saved_state.check(state, own.numel(), f"{name}: state of parameter {key}")
                    state = saved_state.converted(state, self._bits(parameter, group))
                    for entry, (shape, _) in layout(own.shape, 32).items():
                        state[entry] = state[entry].view(shape)
                    state["step"] = int(state["step"])
                    parameters.append(parameter)
                    states.append((own.device, state))
        placed = self._placed(states)
        merged = [
            {**group, **{k: other[k] for k in _LOADED if k in other}, "params": other["params"]}
            for group, other in zip(groups, saved_groups)
        ]
        for group in merged:
            check_adam(group)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": merged})
        self._synchronize()
        for parameter, state in zip(parameters, placed):
            self.state[parameter] = state
