"""What is on within ZeRO-3 is off in the context, and on again after it; e2e/test_engines_deepspeed.py
has DeepSpeed itself."""

import sys
from types import SimpleNamespace

import pytest
from transformers.integrations import deepspeed

from oddsmith.integrations import zero3
from oddsmith.integrations.zero3 import outside_zero3


class Configured:
    def is_zero3(self):
        return True


@pytest.fixture
def configured():
    config = Configured()
    deepspeed.set_hf_deepspeed_config(config)
    yield config
    deepspeed.unset_hf_deepspeed_config()


def test_transformers_splits_nothing(configured):
    assert deepspeed.is_deepspeed_zero3_enabled()
    with outside_zero3():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert deepspeed.is_deepspeed_zero3_enabled()
    with pytest.raises(KeyError), outside_zero3():
        raise KeyError
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_deepspeed_splits_nothing(monkeypatch):
    calls = []
    partition = SimpleNamespace(
        shutdown_init_context=lambda: calls.append("off"),
        restore_init_context=lambda: calls.append("on"),
    )
    monkeypatch.setitem(sys.modules, zero3._PARTITION, partition)
    with outside_zero3():
        assert calls == ["off"]
    assert calls == ["off", "on"]
    assert not deepspeed.is_deepspeed_zero3_enabled()
