"""The contracts of pyproject.toml about who imports whom: kept, and broken by a wrong import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import oddsmith
from support.paths import ROOT

LAYERS = "Rooms import those below them"
CIRCLES = "No circles, between rooms or within one"
TORCH_ONLY = "The rooms of the algorithms know torch only"
PEERS = "What results are compared with is no part of the package"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the package in a folder against the contracts."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--config", ROOT / "pyproject.toml", "--no-cache"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def copied(folder: Path) -> Path:
    shutil.copytree(
        Path(oddsmith.__file__).parent,
        folder / "oddsmith",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return folder / "oddsmith"


def test_every_contract_is_kept(tmp_path):
    copied(tmp_path)
    run = lint_imports(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in (LAYERS, CIRCLES, TORCH_ONLY, PEERS):
        assert f"{name} KEPT" in run.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("head/ops.py", "from ..data import chat", LAYERS),
        ("sources/find.py", "from ..integrations import patch", LAYERS),
        ("training/metrics.py", "def late():\n    from ..trainer import ORPOTrainer", LAYERS),
        ("data/chat.py", "from .dataset import validate", CIRCLES),
        ("quant/state.py", "from transformers import AutoModel", TORCH_ONLY),
        ("optim/checks.py", "import peft.tuners.lora", TORCH_ONLY),
        ("trainer.py", "import trl", PEERS),
        ("integrations/bitsandbytes_layers.py", "import bitsandbytes", PEERS),
    ],
)
def test_a_wrong_import_breaks_one(file, line, broken, tmp_path):
    path = copied(tmp_path) / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    run = lint_imports(tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"{broken} BROKEN" in run.stdout


def test_a_new_room_needs_a_place(tmp_path):
    room = copied(tmp_path) / "attic"
    room.mkdir()
    (room / "__init__.py").write_text('"""A room that no layer names."""\n')
    run = lint_imports(tmp_path)
    assert run.returncode == 1
    assert "attic" in run.stdout
