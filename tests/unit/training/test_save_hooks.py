"""Saving in one process; tests/e2e/test_engines.py saves weights that are split."""

from types import SimpleNamespace

import pytest
from transformers import Trainer

from oddsmith.training.save_hooks import SaveHooks


def trainer(folder, writes, calls, **state):
    class Fake(SaveHooks):
        args = SimpleNamespace(output_dir=str(folder), should_save=True)
        accelerator = SimpleNamespace(state=SimpleNamespace(**state))

    def save_model(self, output_dir=None, _internal_call=False):
        plugin = state.get("fsdp_plugin")
        calls.append(None if plugin is None else plugin.state_dict_type)
        if writes:
            (folder / "model.safetensors").write_bytes(b"x")

    return Fake, save_model


@pytest.mark.parametrize("writes", [True, False])
def test_a_model_without_weights_is_an_error(writes, tmp_path, monkeypatch):
    kind, save_model = trainer(tmp_path, writes, [])
    monkeypatch.setattr(Trainer, "save_model", save_model)
    fake = object.__new__(type("Fake", (kind, Trainer), {}))
    if writes:
        fake.save_model()
    else:
        with pytest.raises(RuntimeError, match="no weights were written"):
            fake.save_model()
        fake.save_model(_internal_call=True)  # into a checkpoint in parts


def test_the_last_save_gathers(tmp_path, monkeypatch):
    plugin = SimpleNamespace(state_dict_type="SHARDED_STATE_DICT")
    calls = []
    kind, save_model = trainer(tmp_path, True, calls, fsdp_plugin=plugin)
    monkeypatch.setattr(Trainer, "save_model", save_model)
    fake = object.__new__(type("Fake", (kind, Trainer), {}))
    fake.save_model(_internal_call=True)
    fake.save_model()
    assert [str(each) for each in calls] == ["SHARDED_STATE_DICT", "StateDictType.FULL_STATE_DICT"]
    assert plugin.state_dict_type == "SHARDED_STATE_DICT"
