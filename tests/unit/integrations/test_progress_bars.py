"""The progress bars of datasets and transformers: hidden and restored."""

import datasets
import pytest
from transformers.utils import logging

from oddsmith.integrations.progress_bars import NoProgressBars


@pytest.mark.parametrize("shown", [True, False])
def test_other_bars_are_hidden_and_come_back(shown):
    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        with NoProgressBars():
            assert datasets.are_progress_bars_disabled()
            assert not logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled() is not shown
        assert logging.is_progress_bar_enabled()
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
