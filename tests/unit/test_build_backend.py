"""The build backend: torch-sys must find the Python of pip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

FOLDER = ROOT / "python"
HOOKS = {
    f"{hook}_{kind}"
    for hook in ("build", "get_requires_for_build")
    for kind in ("editable", "sdist", "wheel")
} | {"prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel"}


def in_backend(code: str, path: str) -> list[str]:
    """Lines that `code` prints after an import of the backend, on another PATH."""
    command = [sys.executable, "-c", f"import subprocess, os, build_backend\n{code}"]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(FOLDER)}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


@pytest.fixture(autouse=True)
def maturin():
    pytest.importorskip("maturin", reason="the backend is maturin's; make test installs it")


@pytest.mark.parametrize("name", ["python", "python3"])
def test_path_leads_to_the_running_interpreter(name, tmp_path):
    """Also if another Python comes first on PATH."""
    other = tmp_path / name
    other.write_text("#!/bin/sh\necho other\n")
    other.chmod(0o755)
    ask = f"subprocess.run(['{name}', '-c', 'import sys; print(sys.prefix, sys.version)'])"
    prefix = in_backend(ask, f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert prefix == f"{sys.prefix} {sys.version}".splitlines()


def test_maturin_is_found_in_an_environment_that_is_not_active():
    (found,) = in_backend("import shutil; print(shutil.which('maturin'))", "/usr/bin:/bin")
    assert Path(found).parent == Path(sys.executable).parent


def test_nothing_is_left_behind():
    (folder,) = in_backend("print(os.environ['PATH'].split(os.pathsep)[0])", "/usr/bin:/bin")
    assert "oddsmith-build-" in folder
    assert not Path(folder).exists()


def test_the_hooks_are_there():
    (hooks,) = in_backend("print(*build_backend.__all__)", "/usr/bin:/bin")
    assert set(hooks.split()) == HOOKS
    in_backend("[getattr(build_backend, name) for name in build_backend.__all__]", "/usr/bin:/bin")
