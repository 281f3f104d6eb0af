"""Registers and memory of the kernels on each architecture, from the assembler's report.

`python tests/support/kernel_usage.py [FILE.csv]` prints it, and writes it to a file.
"""

import csv
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

from oddsmith import _core

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


class Usage(NamedTuple):
    """Usage of a thread, memory in bytes; `shared` is per block, without dynamic shared memory."""

    source: str
    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def read_report(source: str, architecture: str, report: str) -> list[Usage]:
    parts = re.split(r"Compiling entry function '(\w+)' for '\w+'\n", report)[1:]
    found = []
    for kernel, text in zip(parts[::2], parts[1::2]):
        # Functions that were not inlined come after the kernel's own lines.
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        registers = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        memory = [sum(int(frame[i]) for frame in frames) for i in range(3)]
        numbers = int(registers[1]), int(shared[1]) if shared else 0
        found.append(Usage(source, kernel, architecture, *numbers, *memory))
    return found


def usage(source: str, architecture: str) -> list[Usage]:
    """Compiles a source.

    Raises:
        RuntimeError: With the compiler's message.
    """
    binary, report = _core.compile_kernels(source, architecture)
    assert binary[:4] == b"\x7fELF"
    return read_report(source, architecture, report)


def usage_of_all() -> list[Usage]:
    pairs = product(_core.kernel_sources(), ARCHITECTURES)
    # Processes, as the compiler works for one thread at a time; new ones, as torch's threads run here.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return [row for rows in pool.map(usage, *zip(*pairs)) for row in rows]


def text_of(rows: list[Usage]) -> str:
    """Registers of each kernel by architecture, +shared memory, !stack frame if there is one."""
    cells = {row.kernel: {} for row in rows}
    for row in rows:
        shared = f"+{row.shared}" if row.shared else ""
        stack = f"!{row.stack}" if row.stack else ""
        cells[row.kernel][row.architecture] = f"{row.registers}{shared}{stack}"
    width = max(map(len, cells), default=0)
    lines = [" " * width + "".join(f"{name:>10}" for name in ARCHITECTURES)]
    for kernel, by_architecture in sorted(cells.items()):
        line = "".join(f"{by_architecture.get(name, '-'):>10}" for name in ARCHITECTURES)
        lines.append(f"{kernel:{width}}{line}")
    return "\n".join(lines)


def write(rows: list[Usage], path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Usage._fields)
        writer.writerows(rows)


if __name__ == "__main__":
    found = usage_of_all()
    print(text_of(found))
    if len(sys.argv) > 1:
        write(found, sys.argv[1])
