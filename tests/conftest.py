"""Fixtures of all tests."""

import gc
import os
from pathlib import Path

import pytest

# Processes that tests start import `reference` and `support` too; pytest's own path is in pyproject.toml.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)

# Kernels of the emulated driver are what is tested: no test waits for their self-test unless it asks for it.
os.environ.setdefault("ODDSMITH_KERNELS", "untested")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
if WORKERS:
    # Before torch is imported: workers share the cores, and threads that wait do not spin.
    share = max(1, len(os.sched_getaffinity(0)) // WORKERS)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Ops that the compiled core computes with several threads.
TEAMS = ("parity", "property", "unit/head", "unit/quant", "unit/optim", "unit/packing")


@pytest.fixture(autouse=WORKERS > 0)
def team(request):
    """At least two threads, for any number of workers, in tests of several threads."""
    where = request.path.relative_to(Path(__file__).parent).as_posix()
    if not where.startswith(TEAMS):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    yield
    torch.set_num_threads(before)


def pytest_configure(config):
    from oddsmith import _core

    if not hasattr(_core, "emulate_cuda"):
        raise pytest.UsageError(
            "oddsmith was built without the cargo feature `testing`, which tests need: run `make test-build`"
        )


def pytest_collection_finish(session):
    # Each run of a trainer collects garbage several times; to go through all that was imported takes
    # most of the time of a short run.
    gc.collect()
    gc.freeze()


@pytest.fixture
def tensor_ops_switch():
    """Lets CPU tensors take the path of other devices for one test."""
    from oddsmith import _core

    yield _core.use_tensor_ops
    _core.use_tensor_ops(False)


@pytest.fixture
def emulated_driver(monkeypatch):
    """For one test, CPU tensors take the path of CUDA tensors, with an emulated driver, and end at
    the end of accessible memory.

    Returns the `emulation.Driver` with its recorder and switches.
    """
    import torch

    from oddsmith import _core
    from support import emulation

    if torch.cuda.is_available():
        # The driver is opened once per process, and tests/gpu need that of the GPU.
        pytest.skip("there is a GPU: its driver is in use")
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
