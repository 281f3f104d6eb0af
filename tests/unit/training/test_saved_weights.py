import json
import os

import pytest

from oddsmith.training.saved_weights import check_written, weight_files


def test_what_is_a_model(tmp_path):
    names = ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.bin"]
    names += ["pytorch_model.bin", "second/adapter_model.safetensors"]
    others = ["pytorch_model_fsdp.bin", "optimizer.bin", "training_args.bin", "config.json"]
    others += ["checkpoint-3/model.safetensors", "pytorch_model_fsdp_0/__0_0.distcp"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert set(weight_files(tmp_path)) == {tmp_path / name for name in names}
    assert weight_files(tmp_path / "missing") == {}


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="no weights were written"):
        check_written(tmp_path, {})
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RuntimeError, match="no weights were written"):  # an empty file
        check_written(tmp_path, {})


def test_those_of_an_earlier_run(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    assert weight_files(tmp_path, before=True) == {}  # written just now: its time tells nothing
    os.utime(path, (1e9, 1e9))
    before = weight_files(tmp_path, before=True)
    with pytest.raises(RuntimeError, match="no weights were written"):
        check_written(tmp_path, before)
    path.write_bytes(b"newer")
    check_written(tmp_path, before)


def test_a_missing_part(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"names model-2\.safetensors, which is not in"):
        check_written(tmp_path, {})
    (tmp_path / "model-2.safetensors").write_bytes(b"x")
    check_written(tmp_path, {})
