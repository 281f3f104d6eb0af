"""Every test here runs on a card and, in small, on the emulated one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from oddsmith import _core


@dataclass
class Card:
    """Where kernels run: a CUDA device, or CPU tensors while a driver is emulated."""

    device: torch.device
    emulated: bool

    def count(self, on_card: int, emulated: int) -> int:
        """How much is tried: the emulator takes a microsecond for what a card does in a nanosecond."""
        return emulated if self.emulated else on_card

    def sync(self) -> None:
        if not self.emulated:
            torch.cuda.synchronize()

    @contextmanager
    def slices(self) -> Iterator[None]:
        """CPU tensors take the path of slices, which kernels are compared with."""
        _core.emulate_cuda(False)
        try:
            yield
        finally:
            _core.emulate_cuda(self.emulated)


@pytest.fixture(params=[pytest.param("card", marks=pytest.mark.gpu), "emulated"])
def card(request) -> Card:
    if request.param == "emulated":
        request.getfixturevalue("emulated_driver")
        return Card(torch.device("cpu"), True)
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return Card(torch.device("cuda"), False)
