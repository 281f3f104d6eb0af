"""README.md keeps its word: its Python runs, its files exist, its flags are known."""

import re

import pytest
import torch
from datasets import Dataset

from oddsmith.cli import commands
from oddsmith.cli.checkpoint_flags import merge_parser, quantize_parser
from oddsmith.cli.data_flags import inspect_parser, prepare_parser
from oddsmith.cli.train_flags import TrainParser
from oddsmith.demo.model import build_model, train_tokenizer
from oddsmith.demo.tasks import make_pairs
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def stand_ins(tmp_path) -> dict[str, str]:
    """Local folders for the hub ids of the examples."""
    pairs = make_pairs(48, seed=8)
    rows = [
        {
            "prompt": row["prompt"][0]["content"],
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
        }
        for row in pairs
    ]
    (tmp_path / "pairs" / "data").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(
        tmp_path / "pairs" / "data" / "train_prefs-00000-of-00001.parquet"
    )
    tokenizer = train_tokenizer(row["prompt"] for row in rows)
    torch.manual_seed(9)
    build_model(tokenizer, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return {
        "mistralai/Mistral-7B-Instruct-v0.3": str(tmp_path / "model"),
        "HuggingFaceH4/ultrafeedback_binarized": str(tmp_path / "pairs"),
    }


def test_there_are_examples():
    assert len(PYTHON) >= 3
    assert len(SHELL) >= 3


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[0])
def test_python_examples_run(code, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for hub_id, folder in stand_ins.items():
        code = code.replace(hub_id, folder)
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 18  # three times 48 rows in batches of 8
    if "result" in names:
        assert torch.isfinite(names["hidden"].grad).all()
        assert names["weight"].grad.abs().sum() > 0


def test_the_file_tree_is_true():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    folders, seen = [ROOT], 0
    for line in tree.splitlines():
        indent, names = re.match(r"( *)(\S+(?:,? \S+[./]\S*)*)", line).groups()
        del folders[1 + len(indent) // 2 :]
        for name in re.split(r",? ", names):
            path = folders[-1] / name
            assert path.exists(), f"README names {path.relative_to(ROOT)}"
            seen += 1
        if len(names.split()) == 1 and names.endswith("/"):
            folders.append(folders[-1] / names)
    assert seen > 30


def test_every_module_is_in_the_file_tree():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    for path in (ROOT / "python" / "oddsmith").rglob("*.py"):
        name = f"{path.parent.name}/" if path.name == "__init__.py" else path.name
        assert name in tree, path


def test_commands_and_flags_exist():
    flags = {flag for block in SHELL for flag in re.findall(r"(?<= )--[a-z_]+", block)}
    data = (prepare_parser(), inspect_parser())
    parsers = (TrainParser(), *data, quantize_parser(), merge_parser())
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    assert flags - {"--release"} <= known
    named = {name for block in SHELL for name in re.findall(r"oddsmith (\w+)", block)}
    assert named == set(commands.COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(SHELL), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
