"""Output folders appear when they are complete: errors, full disks and interrupts change
nothing."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from oddsmith.checkpoint import write
from oddsmith.checkpoint.quantize import quantize_checkpoint
from oddsmith.checkpoint.staging import check_free, copy_others, staged, write_json
from oddsmith.errors import UserError
from support.checkpoint_models import assert_quantized, linear_names, mistral, weights


def test_overwriting_is_asked_for(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json")
    old += ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "vocab.json")
    for name in old:
        (out / name).write_text("old")
    with pytest.raises(UserError, match="out: has config.json already; --overwrite"):
        quantize_checkpoint(base, out)
    quantize_checkpoint(base, out, overwrite=True)
    found = sorted(path.name for path in out.iterdir())
    assert found == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt", "tokenizer.json",
    ]  # fmt: skip
    assert_quantized(weights(base), weights(out), linear_names(mistral()), 64, False)


def test_a_full_disk_is_found_first(base, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("oddsmith.checkpoint.staging.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB needed, 0.00 GB free"):
        quantize_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


LIMITED = """
import resource, signal, sys
from oddsmith import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.main(["quantize", *sys.argv[1:]]))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on files")
def test_a_write_that_fails_leaves_what_was_there(base, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(base, out, blocksize=32)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, base, out, "--overwrite"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "oddsmith quantize: error: " in run.stderr
    assert "File too large" in run.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_interrupt_leaves_nothing(base, tmp_path, monkeypatch):
    class Interrupted(write.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(write, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_new_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out, overwrite=False) as stage:
        (stage / "config.json").write_text("{}")
        (stage / "sub").mkdir()
        (stage / "sub" / "x.txt").write_text("x")
        assert not out.exists() and stage.parent == out.parent
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == [
        "config.json", "sub", "sub/x.txt"
    ]  # fmt: skip
    (tmp_path / "other").mkdir()
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_the_folder_as_it_was(there, tmp_path):
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), staged(out, overwrite=True) as stage:
        (stage / "config.json").write_text("new")
        raise ZeroDivisionError
    assert out.exists() == there
    assert not there or [path.read_text() for path in out.iterdir()] == ["old"]


def test_the_configuration_is_replaced_last(tmp_path, monkeypatch):
    replaced, replace = [], os.replace

    def record(source, target):
        replaced.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("oddsmith.checkpoint.staging.os.replace", record)
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", overwrite=True) as stage:
        for name in ("config.json", "model.safetensors.index.json", "z.json", "a.safetensors"):
            (stage / name).write_text("{}")
    assert replaced == ["a.safetensors", "z.json", "model.safetensors.index.json", "config.json"]


def test_room_is_counted_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "oddsmith.checkpoint.staging.shutil.disk_usage", lambda _: SimpleNamespace(free=2_500_000)
    )
    check_free(tmp_path, 2_500_000)
    with pytest.raises(UserError, match=r"1.50 GB needed, 0.00 GB free"):
        check_free(tmp_path, 1_500_000_000)


def test_json_and_copies(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": {"c": None}})
    assert (tmp_path / "a.json").read_text() == ('{\n  "a": {\n    "c": null\n  },\n  "b": 1\n}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    target = tmp_path / "target"
    target.mkdir()
    copy_others([tmp_path / "a.json", tmp_path / "sub" / "b.txt"], tmp_path, target)
    assert (target / "sub" / "b.txt").read_text() == "b" and (target / "a.json").exists()
