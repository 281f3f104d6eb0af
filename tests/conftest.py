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
