"""Importing the package: lazily, and only under the torch that it was built for."""

import subprocess
import sys

import pytest

import oddsmith
from oddsmith import _core, torch_version


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


def test_the_core_was_built_for_the_required_torch():
    torch_version.check(_core.TORCH_BUILD_VERSION)
    torch_version.check("2.11.3+cpu")


@pytest.mark.parametrize("version", ["2.10.1", "2.12.0+cu130", "2.1.11", "3.11.0"])
def test_another_torch_is_named_with_the_way_out(version):
    with pytest.raises(ImportError) as raised:
        torch_version.check(version)
    assert str(raised.value) == (
        f"oddsmith was built for torch 2.11 and found torch {version}; "
        'install it with: pip install "torch==2.11.*"'
    )


@pytest.mark.parametrize(
    "statement",
    [
        "from oddsmith import ORPOTrainer",
        "from oddsmith.functional import linear_orpo",
        "import oddsmith.optim",
        "import oddsmith; oddsmith.nn",
        "from oddsmith.checkpoint import quantize",
    ],
)
def test_another_torch_stops_every_way_to_the_core(statement):
    code = (
        "import sys, torch; torch.__version__ = '2.13.0'\n"
        f"try:\n    {statement}\n"
        "except ImportError as error:\n"
        "    sys.exit(0 if '2.13.0' in str(error) and 'oddsmith._core' not in sys.modules else 1)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
