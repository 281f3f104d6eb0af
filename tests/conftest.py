"""What all tests share."""

import os
from pathlib import Path

import pytest

# Processes that tests start import `reference` and `support` too; pytest's own path is in pyproject.toml.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)


def pytest_configure(config):
    from oddsmith import _core

    if not hasattr(_core, "emulate_cuda"):
        raise pytest.UsageError(
            "oddsmith was built without the cargo feature `testing`, which tests need: run `make test-build`"
        )


@pytest.fixture
def tensor_ops_switch():
    """Lets CPU tensors take the path of other devices for one test."""
    from oddsmith import _core

    yield _core.use_tensor_ops
    _core.use_tensor_ops(False)


@pytest.fixture
def emulated_driver(monkeypatch):
    """For one test, CPU tensors take the path of CUDA tensors, through an emulated driver, and end where
    memory does.

    Recorder and switches of the driver are those of `emulation.Driver`.
    """
    import torch

    from oddsmith import _core
    from support import emulation

    if torch.cuda.is_available():
        # The driver is opened once a process, and tests/gpu need the card's.
        pytest.skip("there is a card: its driver is in use")
    library = emulation.build()
    monkeypatch.setenv("ODDSMITH_CUDA_DRIVER", str(library))
    driver = emulation.Driver(library)
    driver.reset()
    _core.emulate_cuda(True)
    try:
        with emulation.guarded_memory():
            yield driver
    finally:
        _core.emulate_cuda(False)
        driver.reset()
