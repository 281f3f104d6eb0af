"""Saving in one process; tests/e2e/test_engines.py saves weights that are split."""

import errno
import json
from types import SimpleNamespace

import pytest
from transformers import Trainer

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training.save_hooks import SaveHooks
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs


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


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_what_is_uploaded_is_gathered(engine, tmp_path, monkeypatch):
    """`push_to_hub` saves as if into a checkpoint, which is in parts here."""
    zero = SimpleNamespace(gather_16bit_weights_on_model_save=False)
    plugin = SimpleNamespace(state_dict_type="SHARDED_STATE_DICT")
    calls = []
    kind, _ = trainer(tmp_path, True, [], **{f"{engine}_plugin": plugin})

    def save_model(self, output_dir=None, _internal_call=False):
        calls.append((str(plugin.state_dict_type), zero.gather_16bit_weights_on_model_save))

    def push_to_hub(self, *args, **kwargs):
        self.save_model(_internal_call=True)
        return args, kwargs

    monkeypatch.setattr(Trainer, "save_model", save_model)
    monkeypatch.setattr(Trainer, "push_to_hub", push_to_hub)
    engine_of_zero = SimpleNamespace(_config=SimpleNamespace(zero_config=zero))
    own = {"deepspeed": engine_of_zero, "model": SimpleNamespace()}
    fake = object.__new__(type("Fake", (kind, Trainer), own))
    assert fake.push_to_hub("said", blocking=False) == (("said",), {"blocking": False})
    fake.save_model(_internal_call=True)
    parts = ("SHARDED_STATE_DICT", False)
    whole = ("StateDictType.FULL_STATE_DICT", False) if engine == "fsdp" else (parts[0], True)
    assert calls == [whole, parts]


@pytest.fixture
def whole(tmp_path):
    """A trainer that has saved a model, metrics and its state."""
    tokenizer = make_tokenizer()
    made = ORPOTrainer(
        model=make_model("qwen3_tied", tokenizer),
        args=ORPOConfig(**arguments(tmp_path)),
        train_dataset=pairs(4),
        processing_class=tokenizer,
    )
    made.save_model()
    made.save_metrics("train", {"train_loss": 1.0})
    made.save_state()
    return made


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_leaves_the_model_that_was_there(whole, tmp_path, monkeypatch):
    before = files(tmp_path)
    whole.model.model.norm.weight.data.fill_(3)
    monkeypatch.setattr(type(whole.processing_class), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        whole.save_model()
    assert files(tmp_path) == before
    monkeypatch.undo()
    whole.save_model()
    after = files(tmp_path)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["model.safetensors"]


def test_weights_in_parts_and_in_one_file(whole, tmp_path):
    """One form leaves nothing of the other, which would be loaded in its place."""
    save, config = whole.model.save_pretrained, whole.model.config
    whole.model.save_pretrained = lambda *args, **kwargs: save(
        *args, max_shard_size="20KB", **kwargs
    )
    whole.save_model()
    assert "model.safetensors" not in files(tmp_path)
    assert "model.safetensors.index.json" in files(tmp_path)
    whole.model.save_pretrained = save
    whole.save_model()
    names = [name for name in files(tmp_path) if name.startswith("model")]
    assert names == ["model.safetensors"]
    assert type(whole.model).from_pretrained(tmp_path).config.hidden_size == config.hidden_size


def test_metrics_and_state_are_whole_or_as_they_were(whole, tmp_path, monkeypatch):
    assert json.loads(files(tmp_path)["all_results.json"]) == {"train_loss": 1.0}
    whole.save_metrics("eval", {"eval_loss": 2.0})
    before = files(tmp_path)
    assert json.loads(before["all_results.json"]) == {"train_loss": 1.0, "eval_loss": 2.0}
    assert json.loads(before["eval_results.json"]) == {"eval_loss": 2.0}
    assert json.loads(before["trainer_state.json"])["global_step"] == 0
    monkeypatch.setattr("oddsmith.stage.os.fsync", full)
    for save in (whole.save_state, lambda: whole.save_metrics("eval", {"eval_loss": 3.0})):
        with pytest.raises(OSError, match="No space"):
            save()
    assert files(tmp_path) == before


def test_the_readme_that_was_there_is_kept(whole, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    whole.save_model()
    assert files(tmp_path)["README.md"] == b"mine"
