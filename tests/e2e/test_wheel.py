"""The wheel: what is in it, and what installing it changes.

`ODDSMITH_WHEEL` names the file; without it the slow tests build one for this machine.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.paths import ROOT
from support.wheel import faults_of_wheel

MATURIN = shutil.which(
    "maturin", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
)
needs_maturin = pytest.mark.skipif(MATURIN is None, reason="needs maturin")
PACKAGES = Path(sysconfig.get_path("purelib"))


def run(*command: object, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass
class Environment:
    """An environment of Python whose PATH has no compiler."""

    folder: Path

    def run(self, *command: object) -> str:
        kept = {"HOME", "TMPDIR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"} | {
            name for name in os.environ if name.startswith("PIP_")
        }
        environment = {name: value for name, value in os.environ.items() if name in kept}
        environment["PATH"] = str(self.folder / "bin")
        return run(self.folder / "bin" / command[0], *command[1:], env=environment, cwd=self.folder)

    def pip(self, *arguments: object) -> str:
        return self.run("python", "-m", "pip", *arguments)

    def installed(self) -> dict[str, str]:
        listed = json.loads(self.pip("list", "--format", "json"))
        return {each["name"].lower(): each["version"] for each in listed}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    """A new environment with everything that this one has, by links, but for oddsmith."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    run(sys.executable, "-m", "venv", "--without-pip", made.folder)
    packages = Path(
        made.run("python", "-c", "import sysconfig as s; print(s.get_path('purelib'))").strip()
    )
    for path in PACKAGES.iterdir():
        if not path.name.lower().startswith(("oddsmith", "__editable__", "__pycache__")):
            (packages / path.name).symlink_to(path)
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if "ODDSMITH_WHEEL" in os.environ:
        return Path(os.environ["ODDSMITH_WHEEL"]).resolve()
    if MATURIN is None:
        pytest.skip("needs maturin, or a wheel in ODDSMITH_WHEEL")
    folder = tmp_path_factory.mktemp("wheel")
    run(MATURIN, "build", "--release", "--locked", "--out", folder, cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_named_wheel_keeps_its_promise():
    if "ODDSMITH_WHEEL" not in os.environ:
        pytest.skip("ODDSMITH_WHEEL names no wheel")
    assert faults_of_wheel(Path(os.environ["ODDSMITH_WHEEL"])) == []


@pytest.mark.slow
def test_installing_it_adds_oddsmith_and_changes_nothing(environment, wheel, tmp_path):
    """Without a compiler and, where its requirements are there, without a registry."""
    before = environment.installed()
    assert "torch" in before and "oddsmith" not in before
    for tool in ["cargo", "rustc", "cc", "gcc", "g++", "c++", "clang"]:
        assert shutil.which(tool, path=str(environment.folder / "bin")) is None
    report = tmp_path / "report.json"
    environment.pip("install", "--dry-run", "--quiet", "--report", report, wheel)
    planned = json.loads(report.read_text(encoding="utf-8"))["install"]
    new = {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in planned}
    assert "oddsmith" in new and not set(new) & set(before)
    # The packages are links: were one replaced in spite of the plan, the original would go.
    pins = tmp_path / "pins.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in before.items()))
    environment.pip("install", "--constraint", pins, wheel)
    assert environment.installed() == before | new
    environment.run("oddsmith", "demo", "--steps", "2", "--output-dir", tmp_path / "demo")
    where = environment.run("python", "-c", "import oddsmith; print(oddsmith.__file__)")
    assert where.startswith(str(environment.folder))
    assert (tmp_path / "demo").is_dir()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(MATURIN, "sdist", "--out", folder, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@needs_maturin
def test_the_source_archive_has_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = run("git", "ls-files", "src", "kernels", "python", cwd=ROOT).split()
    assert set(tracked) <= names
    assert {
        "Cargo.toml",
        "Cargo.lock",
        "build.rs",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    } <= names
    assert not [name for name in names if re.search(r"\.(so|pyc)$", name)]


@pytest.mark.slow
@needs_maturin
def test_an_installation_from_the_source_archive(sdist, tmp_path):
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    run(*pip, "--target", target, sdist)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from oddsmith import _core, self_test; "
    code += "print(_core.__file__); sys.exit(self_test.run())"
    assert run(sys.executable, "-c", code, target).startswith(str(target))
