"""Every test here runs on a GPU and, with small sizes, on the emulated one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from oddsmith import _core
from support import emulation


@dataclass
class Gpu:
    """Where kernels run: a CUDA device, or CPU tensors while a driver is emulated."""

    device: torch.device
    driver: emulation.Driver | None

    @property
    def emulated(self) -> bool:
        return self.driver is not None

    def count(self, on_gpu: int, emulated: int) -> int:
        """Test sizes: the emulator takes a microsecond for a nanosecond of a GPU."""
        return emulated if self.emulated else on_gpu

    def sync(self) -> None:
        if not self.emulated:
            torch.cuda.synchronize()

    def kernels(self, run: Callable[[], object]) -> set[str]:
        """Names of the kernels that `run` launches; on a GPU those of libtorch too."""
        if self.emulated:
            before = len(self.driver.launches())
            run()
            return {launch.kernel for launch in self.driver.launches()[before:]}
        from torch.profiler import ProfilerActivity, profile

        run()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            run()
            self.sync()
        return {event.key for event in profiler.key_averages()}

    @contextmanager
    def slices(self) -> Iterator[None]:
        """CPU tensors take the path of slices, which kernels are compared with."""
        _core.emulate_cuda(False)
        try:
            yield
        finally:
            _core.emulate_cuda(self.emulated)


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "emulated"])
def gpu(request) -> Iterator[Gpu]:
    if request.param == "emulated":
        driver = request.getfixturevalue("emulated_driver")
        # tests/cuda has the other order: a missing barrier gives wrong results in one of the two.
        with driver.reversed():
            yield Gpu(torch.device("cpu"), driver)
        return
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    yield Gpu(torch.device("cuda"), None)
