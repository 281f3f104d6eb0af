"""mypy's stubtest of the compiled core, which loads only after torch and its libraries."""

import sys
from pathlib import Path

import torch  # noqa: F401
from mypy import stubtest

HERE = Path(__file__).parent

if __name__ == "__main__":
    options = ["--mypy-config-file", str(HERE.parents[1] / "pyproject.toml")]
    options += ["--allowlist", str(HERE / "stub_allowlist.txt")]
    sys.exit(stubtest.test_stubs(stubtest.parse_options(["oddsmith._core", *options])))
