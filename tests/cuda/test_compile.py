"""Every kernel compiles for every architecture, within its registers."""

import csv
import subprocess
import sys

import pytest

from oddsmith import _core
from support.emulation import KERNELS
from support.kernel_usage import ARCHITECTURES, Usage, read_report, text_of, usage_of_all, write

# Kernels that may spill registers, and why.
MAY_SPILL = {
    "adamw8bit_f16": "4 bytes on sm_75, where ptxas uses 64 registers of its own accord",
}


@pytest.fixture(scope="module")
def table() -> list[Usage]:
    rows = usage_of_all()
    print(text_of(rows))  # shown by pytest -s, and when a test fails
    return rows


def test_every_kernel_compiles_for_every_architecture(table):
    by_architecture = {name: set() for name in ARCHITECTURES}
    for row in table:
        by_architecture[row.architecture].add((row.source, row.kernel))
    kernels = by_architecture["sm_75"]
    assert {source for source, _ in kernels} == set(_core.kernel_sources())
    assert all(found == kernels for found in by_architecture.values())


def test_every_source_is_embedded():
    assert _core.kernel_sources() == sorted(path.stem for path in KERNELS.glob("*.cu"))


def test_no_kernel_spills(table):
    spilled = [row for row in table if row.stack or row.spill_stores or row.spill_loads]
    assert not [row for row in spilled if row.kernel not in MAY_SPILL]
    # A reason that is no longer needed must be removed.
    assert set(MAY_SPILL) <= {row.kernel for row in spilled}


REPORT = """ptxas info    : Compiling entry function 'k' for 'sm_90'
ptxas info    : Function properties for k
ptxas         .     24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 1424 bytes smem
ptxas info    : Compiling entry function 'k2' for 'sm_90'
ptxas info    : Function properties for k2
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_the_report_of_a_spill_is_read_and_shown(tmp_path):
    rows = read_report("s", "sm_90", REPORT)
    assert rows == [
        Usage("s", "k", "sm_90", 255, 1424, 24, 16, 20),
        Usage("s", "k2", "sm_90", 8, 0, 0, 0, 0),
    ]
    assert "255+1424!24" in text_of(rows)
    write(rows, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        assert [row["spill_loads"] for row in csv.DictReader(file)] == ["20", "0"]


def test_errors_name_source_and_architecture():
    with pytest.raises(RuntimeError, match='no kernel source is named "nf5"'):
        _core.compile_kernels("nf5", "sm_90")
    with pytest.raises(RuntimeError, match="gpu-architecture"):
        _core.compile_kernels("nf4", "sm_10")


def test_the_import_opens_no_library_of_cuda():
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "def libraries():\n"
        "    lines = Path('/proc/self/maps').read_text().splitlines()\n"
        "    return {Path(line.split()[-1]).name for line in lines}\n"
        "before = libraries()\n"
        "import oddsmith, oddsmith.functional\n"
        "new = libraries() - before\n"
        "assert any(name.startswith('_core') for name in new), new\n"
        "assert not [name for name in new if 'cuda' in name or 'nvrtc' in name], new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
