"""What unit tests share."""

import logging

import pytest


@pytest.fixture
def log(caplog):
    """The log, with what has been said once in this process forgotten."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger().warning_once.__func__.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog
