"""The emulated driver, instead of a GPU's."""

from pathlib import Path

import pytest

from support import emulation


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
