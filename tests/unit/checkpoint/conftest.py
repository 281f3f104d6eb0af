"""What tests of checkpoints share."""

from pathlib import Path

import pytest

from support.checkpoint_models import save_base


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")
