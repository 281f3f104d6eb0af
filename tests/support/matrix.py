"""One wheel under other releases of torch, Python and what else it stands on.

`python tests/support/matrix.py FILE.whl` installs a wheel, unchanged, into an environment for each cell of the
matrix, trains the demo for a few steps and runs tests there, and writes the table of docs/compatibility.md.
The environments are in the cache folder: made where they do not exist, brought up to date where they do.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
CACHE = Path(os.environ.get("ODDSMITH_CACHE") or Path.home() / ".cache" / "oddsmith") / "matrix"

# Everything that goes through torch's interfaces, and those of the libraries; runs of three steps beside TRL.
SELECTION = (
    "abi",
    "cuda/test_launch.py",
    "unit/head",
    "unit/integrations",
    "unit/optim",
    "unit/packing",
    "unit/quant",
    "unit/test_functional.py",
    "unit/test_nn.py",
    "unit/test_self_test.py",
    "unit/test_torch_version.py",
    "unit/test_trainer.py",
    "unit/training",
    "parity/test_head.py",
    "parity/test_trainer_parity.py",
)
LIBRARIES = ("transformers", "peft", "accelerate", "datasets")
COLUMNS = ("torch", "Python", *LIBRARIES, "numpy", "trl", "passed", "skipped", "failed")


@dataclass(frozen=True)
class Cell:
    """Versions that belong together. None of torch is the newest that there is."""

    torch: str | None
    python: str
    # Of `LIBRARIES`: the oldest that pyproject.toml allows, or the newest.
    end: str
    numpy: str
    tests: tuple[str, ...] = SELECTION

    def __str__(self) -> str:
        torch = f"torch {self.torch or 'newest'}"
        return f"{torch}, Python {self.python}, {self.end} libraries, numpy {self.numpy}"

    @property
    def folder(self) -> Path:
        return CACHE / re.sub(r"\W+(?!\d)", "-", str(self)).replace(" ", "-")


WHOLE = ("",)
CELLS = (
    Cell("2.10", "3.10", "oldest", "1.26"),
    Cell("2.10", "3.12", "newest", "2"),
    Cell("2.11", "3.11", "oldest", "1.26"),
    Cell("2.12", "3.12", "newest", "1.26"),
    Cell("2.13", "3.13", "oldest", "2"),
    Cell("2.14", "3.10", "newest", "2"),
    Cell("2.15", "3.12", "oldest", "1.26"),
    Cell("2.15", "3.13", "newest", "2", WHOLE),
    Cell("2.15", "3.14", "newest", "2"),
)


THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


def run(*command: str | Path, **changed: str) -> None:
    """A command in the checkout, with its output shown and no module but the installed ones."""
    unset = {"PYTHONPATH", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    subprocess.run(command, check=True, cwd=ROOT, env={**environment, **changed})


def uv(*arguments: str | Path, **changed: str) -> None:
    surroundings = {"UV_CACHE_DIR": str(CACHE / "uv"), "UV_HTTP_TIMEOUT": "180"}
    run("uv", *arguments, "--quiet", **surroundings, **changed)


def interpreter(version: str) -> Path | None:
    """A Python that starts: on PATH, of pyenv, or one that uv gets."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    managed = CACHE / "python"

    if version == THIS:
        return Path(sys.executable)

    def found() -> Path | None:
        name = f"python{version}"
        kept = (
            path for folder in (pyenv, managed) for path in sorted(folder.glob(f"*/bin/{name}"))
        )
        for place in filter(None, [shutil.which(name), *kept]):
            # The one on PATH may be a stand-in that starts none.
            if not subprocess.run([place, "-c", ""], capture_output=True).returncode:
                return Path(place)
        return None

    if here := found():
        return here
    try:
        uv("python", "install", "--no-bin", "--install-dir", managed, version, UV_HTTP_RETRIES="0")
    except subprocess.CalledProcessError:
        return None
    return found()


def newest() -> Cell:
    """The newest torch, and a Python other than this one where there is one."""
    others = (version for version in ("3.13", "3.12", "3.14") if version != THIS)
    python = next(filter(interpreter, others), THIS)
    return Cell(None, python, "newest", "2")


def oldest() -> dict[str, str]:
    """The lower bounds of `LIBRARIES` in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(re.findall(rf'^    "({"|".join(LIBRARIES)})>=([\d.]+)"', text, re.MULTILINE))


def install(cell: Cell, wheel: Path, python: Path) -> Path:
    """Makes the environment of a cell, or brings it up to date.

    Returns:
        Its interpreter.
    """
    inside = cell.folder / "bin" / "python"
    if not inside.exists():
        uv("venv", "--clear", "--python", python, cell.folder)
    torch = f"torch=={cell.torch}.*" if cell.torch else "torch"
    wanted = [f"oddsmith[test] @ {wheel.as_uri()}", torch, f"numpy=={cell.numpy}.*"]
    # pyarrow 26 takes no older numpy, and does not say so to the resolver.
    wanted += ["pyarrow<26"] if cell.numpy == "1.26" else []
    # TRL, the peer, asks for newer libraries than we do.
    bounds = oldest() if cell.end == "oldest" else {}
    instead = [f"{name}=={version}" for name, version in bounds.items()]
    (cell.folder / "wanted.txt").write_text("\n".join(wanted))
    (cell.folder / "instead.txt").write_text("\n".join(instead))
    lists = ("-r", cell.folder / "wanted.txt", "--overrides", cell.folder / "instead.txt")
    renewed = ("--upgrade", "--reinstall-package", "oddsmith")
    uv("pip", "install", "--python", inside, *renewed, *lists)
    return inside


def try_out(cell: Cell, python: Path) -> dict[str, int]:
    """Runs the self-test, the demo for a few steps, and the tests.

    Returns:
        How many tests passed, were skipped and failed.
    """
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    surroundings = {"HF_HUB_OFFLINE": "1", "PATH": path}
    demo = ("demo", "--steps", "20", "--output-dir", cell.folder / "demo")
    run(python, "-c", "from oddsmith import self_test; assert not self_test.run()", **surroundings)
    run(python, "-m", "oddsmith", *demo, **surroundings)
    report = cell.folder / "tests.xml"
    report.unlink(missing_ok=True)
    tests = [f"tests/{name}" for name in cell.tests]
    processes = ("-n", "auto", "--maxprocesses", "8", "--dist", "loadfile")
    options = (*processes, "-p", "no:cacheprovider", f"--junit-xml={report}")
    try:
        run(python, "-m", "pytest", *tests, *options, **surroundings)
    except subprocess.CalledProcessError:
        if not report.exists():
            raise
    suite = ElementTree.parse(report).getroot()[0]
    count = {name: int(suite.get(name) or 0) for name in ("tests", "skipped", "failures", "errors")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - count["skipped"] - failed
    return {"passed": passed, "skipped": count["skipped"], "failed": failed}


def versions(python: Path) -> dict[str, str]:
    """Of the packages that are columns of the table, and of Python."""
    code = (
        "import sys, json, platform; from importlib.metadata import version; "
        "print(json.dumps({'Python': platform.python_version()} | {n: version(n) for n in sys.argv[1:]}))"
    )
    names = ("torch", *LIBRARIES, "numpy", "trl")
    return json.loads(subprocess.check_output([python, "-c", code, *names]))


def row_file(cell: Cell) -> Path:
    return CACHE / "rows" / f"{cell.folder.name}.json"


def core_sources() -> str:
    """A digest of what the core is compiled from; two builds of the same differ in their bytes."""
    digest = hashlib.sha256()
    folders = (ROOT / "src", ROOT / "kernels")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    for path in sorted([*files, ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "build.rs"]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def row_of(cell: Cell, core: str) -> dict[str, str | int] | None:
    """The result of a cell, if it is one of a core of these sources."""
    file = row_file(cell)
    row = json.loads(file.read_text()) if file.exists() else {}
    return row if row.get("core") == core else None


def table(rows: list[dict[str, str | int]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write(rows: list[dict[str, str | int]]) -> None:
    """Puts the table in the place of the page's."""
    head = re.escape(table([]).splitlines()[0])
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(rf"{head}\n(\|.*\n)*", lambda found: table(rows), text, count=1)
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=lambda name: Path(name).resolve())
    parser.add_argument("--only", default="", help="cells with this text in their names")
    parser.add_argument(
        "--newest",
        action="store_true",
        help="the newest torch alone, and another Python than this if there is one; writes no table",
    )
    parser.add_argument(
        "--discard", action="store_true", help="keep no environment, each of which takes 7 GB"
    )
    given = parser.parse_args()
    core = core_sources()
    cells = [newest()] if given.newest else [cell for cell in CELLS if given.only in str(cell)]
    for number, cell in enumerate(cells, 1):
        start = time.monotonic()
        print(f"\n== {number} of {len(cells)}: {cell}", flush=True)
        if not (python := interpreter(cell.python)):
            print(f"there is no Python {cell.python} here, and none to be had")
            continue
        inside = install(cell, given.wheel, python)
        print(f"installed after {time.monotonic() - start:.0f} s", flush=True)
        row = {**versions(inside), **try_out(cell, inside), "core": core}
        row_file(cell).parent.mkdir(exist_ok=True)
        row_file(cell).write_text(json.dumps(row))
        if given.discard:
            # The environment is made of links to files of the cache.
            shutil.rmtree(cell.folder)
            shutil.rmtree(CACHE / "uv", ignore_errors=True)
        print(f"done after {time.monotonic() - start:.0f} s")
    rows = [row for cell in (cells if given.newest else CELLS) if (row := row_of(cell, core))]
    if not given.newest:
        write(rows)
    print("\n" + table(rows))
    if any(row["failed"] for row in rows) or not rows:
        sys.exit(1)


if __name__ == "__main__":
    main()
