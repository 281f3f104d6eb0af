"""Importing the package: lazily, and only under a torch that has what the core needs."""

import os
import subprocess
import sys

import pytest

import oddsmith


def test_public_names():
    from oddsmith import ORPOConfig, ORPOTrainer, functional

    assert ORPOConfig.__module__ == "oddsmith.config"
    assert ORPOTrainer.__module__ == "oddsmith.trainer"
    assert callable(functional.linear_orpo)
    assert set(dir(oddsmith)) >= {"ORPOConfig", "ORPOTrainer", "functional", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainer'"):
        _ = oddsmith.DPOTrainer


def test_import_leaves_torch_and_transformers_alone():
    code = "import sys, oddsmith; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WAYS = [
    "from oddsmith import ORPOTrainer",
    "from oddsmith.functional import linear_orpo",
    "import oddsmith.optim",
    "import oddsmith; oddsmith.nn",
    "from oddsmith.checkpoint import quantize",
]
# Each way in a process of its own, all of which have one import of torch.
OLD_TORCH = """
import os, sys, torch
torch.__version__ = "2.9.0"
for statement in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            exec(statement)
        except ImportError as error:
            right = "2.9.0" in str(error) and "oddsmith._core" not in sys.modules
            os._exit(0 if right else 1)
        os._exit(2)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_an_old_torch_stops_every_way_to_the_core():
    command = [sys.executable, "-c", OLD_TORCH, *WAYS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert dict(zip(WAYS, done.stdout.split(), strict=True)) == dict.fromkeys(WAYS, "0"), (
        done.stderr
    )
