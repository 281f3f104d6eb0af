"""What a wheel is for, and whether it keeps that promise: `python tests/support/wheel.py FILE.whl`."""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The C library of manylinux_2_28, and what comes with every one of them.
GLIBC = (2, 28)
SYSTEM = {
    "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1",
    "libutil.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip
# Functions that torch, tch and OpenMP define, and everything of C++.
FOREIGN = re.compile(r"(at|atg|ats|atc|atd|aoti|torch|tch|GOMP|omp)_|_Z")


def faults_of_library(path: Path) -> list[str]:
    """What a compiled core needs and should not."""
    command = ["readelf", "--dyn-syms", "--dynamic", "--wide", str(path)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", report)
    undefined = [name.split("@")[0] for name in re.findall(r" UND (\S+)", report)]
    versions = {
        tuple(map(int, found.split("."))) for found in re.findall(r"@GLIBC_([\d.]+)", report)
    }
    faults = [f"needs {name}" for name in needed if name not in SYSTEM]
    faults += [f"leaves {name} undefined" for name in undefined if FOREIGN.match(name)]
    faults += [f"needs glibc {a}" for a in sorted(versions) if a > GLIBC]
    faults += ["has a RUNPATH"] if re.search(r"\((RPATH|RUNPATH)\)", report) else []
    return faults


def faults_of_wheel(path: Path) -> list[str]:
    """What is wrong with a wheel."""
    faults = []
    if not re.fullmatch(r"oddsmith-[^-]+-cp310-abi3-manylinux_2_28_\w+\.whl", path.name):
        faults.append(f"is called {path.name}")
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        cores = [name for name in wheel.namelist() if name.endswith(".so")]
        if cores != ["oddsmith/_core.abi3.so"]:
            return [*faults, f"has the libraries {cores}"]
        return faults + faults_of_library(Path(wheel.extract(cores[0], folder)))


if __name__ == "__main__":
    (wheel,) = map(Path, sys.argv[1:])
    found = faults_of_wheel(wheel)
    if found:
        sys.exit("\n".join(f"{wheel}: {fault}" for fault in found))
    print(
        f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, for every Python from 3.10 and torch from 2.10 on"
    )
