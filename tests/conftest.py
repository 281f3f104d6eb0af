"""What all tests share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import reference`


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

    import emulation
    from oddsmith import _core

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
