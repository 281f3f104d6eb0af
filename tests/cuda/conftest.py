"""The emulated driver, in place of a card's."""

from pathlib import Path

import pytest

import emulation


@pytest.fixture(scope="session")
def samples() -> Path:
    """The library of the kernels beside this file."""
    return emulation.build([Path(__file__).parent / "samples.cu"])


@pytest.fixture
def sample_driver(samples):
    driver = emulation.Driver(samples)
    driver.reset()
    yield driver
    driver.reset()


@pytest.fixture(scope="session")
def emulator() -> Path:
    """The library of all kernels in kernels/."""
    return emulation.build()


@pytest.fixture
def emulated_driver(emulator, monkeypatch):
    """For one test, CPU tensors take the path of CUDA tensors, through the emulator."""
    monkeypatch.setenv("ODDSMITH_CUDA_DRIVER", str(emulator))
    driver = emulation.Driver(emulator)
    driver.reset()
    yield driver
    driver.reset()
