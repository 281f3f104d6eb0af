"""What tests of low-rank optimisers share."""

import pytest

from oddsmith.optim.low_rank import galore_8bit


@pytest.fixture
def eight_bits_for_all(monkeypatch):
    """The tensors of these tests are small; blocks and chunks are partial here."""
    monkeypatch.setattr(galore_8bit, "MIN_8BIT_SIZE", 40)
