"""Folders of checkpoints: their contents, and errors of damaged ones."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oddsmith.checkpoint.folder import Checkpoint, Tensor, file_errors, local_folder, read_tensors
from oddsmith.checkpoint.quantize import quantize_checkpoint
from oddsmith.errors import UserError
from support.checkpoint_models import mistral


def truncate(base: Path) -> None:
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def no_weights(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def bad_index(content):
    def edit(base: Path) -> None:
        (base / "model.safetensors").rename(base / "part.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "is truncated or too long"),
        (no_weights, "must have model.safetensors or .*; found pytorch_model.bin"),
        (lambda base: (base / "model.safetensors").write_bytes(b""), "has 0 bytes"),
        (
            lambda base: (base / "model.safetensors").write_bytes(b"x" * 99),
            "not a safetensors file",
        ),
        (lambda base: (base / "config.json").unlink(), "config.json: No such file"),
        (lambda base: (base / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda base: (base / "config.json").write_text("[]"), "is list; must be a JSON object"),
        (lambda base: (base / "config.json").write_text("{}"), "cannot build the model"),
        (shutil.rmtree, "no such folder"),
        (bad_index({}), "weight_map is None"),
        (bad_index({"weight_map": {"x": "../y"}}), "'../y' is not a file name"),
        (bad_index({"weight_map": {"x": "y.safetensors"}}), "y.safetensors: No such file"),
        (bad_index({"weight_map": {"x": "part.safetensors"}}), "has no tensor 'x', which"),
    ],
)
def test_damaged_folders(damage, words, base, tmp_path):
    damage(base)
    with pytest.raises(UserError, match=words):
        quantize_checkpoint(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_folder_holds(base):
    found = Checkpoint(base)
    assert found.tensors["lm_head.weight"].kind == "BF16"
    assert found.tensors["lm_head.weight"].shape == (96, 48)
    assert [file.name for file in found.others()] == ["generation_config.json", "tokenizer.json"]


def test_several_files_are_those_of_the_index(tmp_path):
    mistral().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base" / "model-00009-of-00009.safetensors").write_bytes(b"not in the index")
    found = Checkpoint(tmp_path / "base")
    named = set(found.index["weight_map"].values())
    assert len(named) > 2 and [shard.name for shard in found.shards] == sorted(named)
    assert found.tensors.keys() == found.index["weight_map"].keys()


def test_files_that_go_with_a_model(base):
    for name in ("tokenizer.model", "modeling_own.py", ".gitattributes"):
        (base / name).write_text("x")
    for name in ("model.gguf", "flax_model.msgpack", "tf_model.h5", "pytorch_model.bin.index.json"):
        (base / name).write_text("weights")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    (base / "onnx").mkdir()
    assert [str(file.relative_to(base)) for file in Checkpoint(base).others()] == [
        "additional_chat_templates/tools.jinja", "generation_config.json", "modeling_own.py",
        "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip


def test_tensors_are_in_the_order_of_their_bytes(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(4).half()}, file)
    tensors = read_tensors(file)
    assert tensors == {"b": Tensor("F32", (2, 3)), "a": Tensor("F16", (4,))}
    with pytest.raises(UserError, match="none.safetensors: No such file"):
        read_tensors(tmp_path / "none.safetensors")


def test_the_hub_is_asked_for_names_that_are_no_folders(base, tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append(name)
        if name == "owner/gone":
            raise OSError("offline")
        return str(base)

    monkeypatch.setattr("oddsmith.checkpoint.folder.snapshot_download", fetch)
    assert local_folder(base) == base and local_folder("no/such/folder") == Path("no/such/folder")
    assert not asked
    assert local_folder("owner/name") == base
    with pytest.raises(UserError, match="owner/gone: no such folder, and the hub says: offline"):
        local_folder("owner/gone")
    assert asked == ["owner/name", "owner/gone"]


def test_errors_of_files_are_user_errors():
    with pytest.raises(UserError, match="^/etc/x: Permission denied$"), file_errors():
        raise PermissionError(13, "Permission denied", "/etc/x")
    with pytest.raises(UserError, match="^odd$"), file_errors():
        raise ValueError("odd")
    with pytest.raises(KeyError), file_errors():
        raise KeyError("a bug stays one")


def test_links_stay_in_the_folder(base, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (base / "inside.json").symlink_to("tokenizer.json")
    Checkpoint(base)
    (base / "notes.json").symlink_to(secret)
    with pytest.raises(
        UserError, match=r"notes.json: is a link to .*secret.json, outside the folder"
    ):
        quantize_checkpoint(base, tmp_path / "out")
    (base / "notes.json").unlink()
    templates = base / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").symlink_to(secret)
    with pytest.raises(UserError, match="tools.jinja: is a link"):
        quantize_checkpoint(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_cache_of_the_hub_has_links(base, tmp_path):
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    quantize_checkpoint(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (tmp_path / "elsewhere.json").write_text("{}")
    (snapshot / "x.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="x.json: is a link"):
        quantize_checkpoint(snapshot, tmp_path / "out", overwrite=True)


def test_json_of_ten_thousand_levels(base, tmp_path):
    (base / "config.json").write_text('{"a":' * 10_000 + "1" + "}" * 10_000)
    with pytest.raises(UserError, match="config.json: is not JSON"):
        Checkpoint(base)


def test_layers_that_no_tensor_has_are_not_built(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(
        UserError, match=r"num_hidden_layers is 1000000000, and there are 21 tensors"
    ):
        quantize_checkpoint(base, tmp_path / "out")


WRONG = (None, "x", -1, 0, 1.5, 2**63, [], [None], {}, {"a": []}, True)


def test_a_configuration_can_be_wrong_in_every_way(base, tmp_path):
    """Each value in turn is of another kind: the result is a model, or one sentence."""
    config = json.loads((base / "config.json").read_text())
    cases = [(name, value) for name in config for value in WRONG if value != config[name]]
    said = 0
    for name, value in random.Random(0).sample(cases, 60):
        (base / "config.json").write_text(json.dumps({**config, name: value}))
        try:
            quantize_checkpoint(base, tmp_path / "out", overwrite=True)
        except UserError:
            said += 1
    assert 10 < said < 50
