"""Steps on a GPU with the optimiser state in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .moments import BLOCKSIZE, blocks_of, is_8bit
from .pages import ALIGNMENT, carve, padded_bytes
from .step import AdamUpdate, NonFinite, adamw_step

# One is copied in, one is used, one is copied out.
_SLOTS = 3


@dataclass
class Piece:
    """A part of an update whose state fits in a slot."""

    update: AdamUpdate
    start: int
    stop: int

    def host(self) -> dict[str, Tensor]:
        """The part's state in host memory."""
        blocks = slice(self.start // BLOCKSIZE, blocks_of(self.stop))
        state = self.update.state
        elements = slice(self.start, self.stop)
        parts = {key: state[key].view(-1)[elements] for key in ("state1", "state2")}
        if is_8bit(state):
            parts |= {key: state[key][blocks] for key in ("absmax1", "absmax2")}
        return parts

    def on_device(self, state: dict[str, Tensor]) -> AdamUpdate:
        """The part's update, with its state on the device."""
        update, elements = self.update, slice(self.start, self.stop)
        return replace(
            update,
            value=update.value.view(-1)[elements],
            grad=update.grad.view(-1)[elements],
            state=state,
            first=update.first + self.start,
        )


def bytes_of(state: dict[str, Any], elements: int) -> int:
    """Bytes of the state of `count` elements in a slot."""
    if is_8bit(state):
        entries = [((elements,), torch.uint8), ((blocks_of(elements),), torch.float32)]
    else:
        entries = [((elements,), torch.float32)]
    return 2 * sum(map(padded_bytes, entries))


def batches(updates: list[AdamUpdate], capacity: int) -> Iterator[list[Piece]]:
    """Group consecutive pieces that fit together in a slot of `capacity` bytes."""
    batch: list[Piece] = []
    free = capacity
    for update in updates:
        start, end = 0, update.value.numel()
        while start < end:
            stop = end
            if bytes_of(update.state, stop - start) > capacity:
                each = 2 + 8 / BLOCKSIZE if is_8bit(update.state) else 8
                whole = int((capacity - 4 * ALIGNMENT) / each) // BLOCKSIZE
                stop = min(end, start + max(whole, 1) * BLOCKSIZE)
            needed = bytes_of(update.state, stop - start)
            if batch and needed > free:
                yield batch
                batch, free = [], capacity
            batch.append(Piece(update, start, stop))
            free -= needed
            start = stop
    if batch:
        yield batch


def slot_capacity(budget: int) -> int:
    """
    Bytes of a slot.

    Raises:
        ValueError: If the budget is too small for one block per slot.
    """
    capacity = budget // _SLOTS // ALIGNMENT * ALIGNMENT
    least = 4 * ALIGNMENT + 8 * BLOCKSIZE
    if capacity < least:
        raise ValueError(f"device_budget is {budget}; must be at least {_SLOTS * least} bytes")
    return capacity


class Staged:
    """
    Copies state to a GPU, updates there, and copies it back; the three overlap for different parts.

    Args:
        device (`torch.device`): Where the parameters are.
        budget (`int`): Bytes of device memory for state. On a CPU, for tests, the copies run one
            after another.

    Raises:
        ValueError: If the budget is too small for one block per slot.
    """

    def __init__(self, device: torch.device, budget: int):
        self.capacity: int = slot_capacity(budget)
        self._device = device
        self._slots = [
            torch.empty(self.capacity, dtype=torch.uint8, device=device) for _ in range(_SLOTS)
        ]
        on_gpu = device.type == "cuda"
        self._in, self._out = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))
        self._free: list[Any] = [None] * _SLOTS
        if self._in is not None:
            # The memory of the slots may still be in use by an earlier tensor's pending work.
            self._in.wait_stream(torch.cuda.current_stream(device))

    def step(self, updates: list[AdamUpdate], bad: NonFinite) -> None:
        """Applies updates with values on the device and state in host memory."""
        if self._in is not None and self._out is not None:
            # Wait for the copies back of the last step.
            self._in.wait_stream(self._out)
        for number, batch in enumerate(batches(updates, self.capacity)):
            slot = number % _SLOTS
            hosts = [piece.host() for piece in batch]
            entries = [(tuple(part.shape), part.dtype) for host in hosts for part in host.values()]
            tensors = iter(carve(self._slots[slot].untyped_storage(), entries))
            states = [{key: next(tensors) for key in host} for host in hosts]
            with self._on(self._in, after=self._free[slot]):
                for host, state in zip(hosts, states):
                    for key, part in host.items():
                        state[key].copy_(part, non_blocking=True)
                ready = self._event()
            self._wait(ready)
            adamw_step([piece.on_device(state) for piece, state in zip(batch, states)], bad)
            with self._on(self._out, after=self._event()):
                for host, state in zip(hosts, states):
                    for key, part in host.items():
                        part.copy_(state[key], non_blocking=True)
                self._free[slot] = self._event()

    def synchronize(self) -> None:
        """Waits until all state is in host memory."""
        if self._out is not None:
            self._out.synchronize()

    @contextlib.contextmanager
    def _on(self, stream: Any, after: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            yield

    def _event(self) -> Any:
        if self._in is None:
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
