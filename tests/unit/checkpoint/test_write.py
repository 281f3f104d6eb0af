"""A checkpoint written tensor by tensor: files, index, casts, the summary."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from oddsmith.checkpoint.folder import Checkpoint, Tensor
from oddsmith.checkpoint.quantize import quantize_checkpoint
from oddsmith.checkpoint.rules import TensorRule
from oddsmith.checkpoint.write import (
    Summary,
    casts,
    check_dtype,
    is_part,
    with_dtype,
    write_checkpoint,
)
from oddsmith.errors import UserError
from support.checkpoint_models import assert_quantized, linear_names, mistral, weights


def test_many_files(tmp_path):
    model = mistral()
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    files = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 2
    quantize_checkpoint(tmp_path / "base", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    after = weights(tmp_path / "out")
    assert_quantized(weights(tmp_path / "base"), after, linear_names(model), 64, False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"].pop(name) == file
    assert not index["weight_map"]


def test_other_files_go_along(base, tmp_path):
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / ".hidden").write_text("no")
    quantize_checkpoint(base, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "chat_template.jinja", "additional_chat_templates/tools.jinja",
    }  # fmt: skip


def test_the_summary_says_how_fast():
    summary = Summary(14, 20, read=3_000_000_000, written=800_000_000, seconds=4.0)
    assert str(summary) == "14 of 20 tensors, 3.00 GB to 0.80 GB in 4.0 s (750 MB/s)"
    assert "in 0.0 s" in str(Summary(0, 0, 0, 0, 0.0))  # no division by zero


def test_dtypes_of_configurations():
    config = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "hidden_size": 4}
    assert with_dtype(config, None) == config and with_dtype(config, None) is not config
    assert with_dtype(config, "float16") == {"dtype": "float16", "hidden_size": 4}
    assert check_dtype("dtype", None) is check_dtype("dtype", "float32") is None
    with pytest.raises(UserError, match="--dtype int8: must be one of float32, bfloat16, float16"):
        check_dtype("dtype", "int8")


def holding(**kinds):
    tensors = {name: Tensor(kind, (2, 2)) for name, kind in kinds.items()}
    return SimpleNamespace(tensors=tensors)


def test_what_is_cast():
    source = holding(**{
        "a.weight": "F32", "b.weight": "BF16", "c.weight": "F16", "d": "I64",
        "a.weight.absmax": "F32", "norm.weight.scale": "F32",
    })  # fmt: skip
    assert is_part(source, "a.weight.absmax") and not is_part(source, "a.weight")
    assert not is_part(source, "norm.weight.scale")  # there are no codes with it
    assert casts(source, None, []) == []
    names = [rule.name for rule in casts(source, "bfloat16", ["c.weight"])]
    assert names == ["a.weight", "norm.weight.scale"]
    assert {rule.dtype for rule in casts(source, "bfloat16", [])} == {"bfloat16"}


def test_rules_decide_tensor_by_tensor(base, tmp_path):
    source = Checkpoint(base)
    rules = [TensorRule("lm_head.weight", "float32"), TensorRule("model.norm.weight", "float16")]
    summary = write_checkpoint(source, tmp_path / "out", rules, {"a": 1})
    before, after = weights(base), weights(tmp_path / "out")
    assert after.pop("lm_head.weight").dtype == torch.float32
    assert after.pop("model.norm.weight").dtype == torch.float16
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert len(after) == len(before) - 2 == summary.tensors - summary.changed
    assert summary.read == (base / "model.safetensors").stat().st_size
    # 2 more bytes for each of the head's 96 x 48 values.
    assert summary.written == sum(tensor.nbytes for tensor in before.values()) + 2 * 96 * 48
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1}


def test_extra_files_replace_others(base, tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("tokenizer.json", "extra.txt"):
        (tmp_path / "more" / name).write_text("mine")
    extra = (sorted((tmp_path / "more").iterdir()), tmp_path / "more")
    write_checkpoint(Checkpoint(base), tmp_path / "out", [], {}, extra_files=extra)
    for name in ("tokenizer.json", "extra.txt"):
        assert (tmp_path / "out" / name).read_text() == "mine"
