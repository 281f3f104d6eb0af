"""Damaged files to every reader: each is read, or refused in words, and never ends a process."""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from oddsmith.check import verdicts
from oddsmith.check.findings import Verdict
from oddsmith.errors import UserError
from oddsmith.sources.records import FileRecords
from support.paths import ROOT

from . import calls
from .counts import Counts

ALL = 10_000_000
_PART = "fuzz"
# Inputs between two lines of progress.
_CHUNK = 20_000
# Tests of the crate, by reader.
RUST = {
    "safetensors": (
        "checkpoint::tests::fuzz::any_bytes_are_a_file_or_an_error",
        "checkpoint::tests::fuzz::any_header_is_a_file_or_an_error",
        "checkpoint::tests::fuzz::a_changed_file_is_a_file_or_an_error",
    ),
    "quant_state": ("checkpoint::tests::fuzz::any_json_is_a_state_or_an_error",),
    "kernels": ("cuda::cache::tests::any_file_in_the_place_of_a_kernel_is_compiled_again",),
}
PYTHON = ("json records", "verdicts", "calls")


def soak(counts: Counts, share: float) -> None:
    """Feeds every reader, a chunk at a time in turns."""
    wanted = max(100, round(ALL * share))
    binary = _binary()
    todo: dict[str, Callable[[int, int], tuple[int, list[str]]]] = {
        name: lambda count, start, tests=tests: _rust(binary, tests, count)
        for name, tests in RUST.items()
    }
    todo |= {name: lambda count, start, name=name: _python(name, count, start) for name in PYTHON}
    while left := [name for name in todo if counts.get(_PART, name)["done"] < wanted]:
        for name in left:
            done = counts.get(_PART, name)["done"]
            begun = time.monotonic()
            made, faults = todo[name](min(_CHUNK, wanted - done), done)
            counts.add(_PART, name, made, time.monotonic() - begun, faults)
            counts.say(_PART, name, wanted)
            if faults:
                return


def _binary() -> str:
    """The tests of the crate, compiled for release."""
    command = "cargo test --release --locked --features cuda --no-run --message-format=json".split()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line).get("executable") for line in done.stdout.splitlines()]
    (binary,) = {each for each in found if each and "oddsmith" in each}
    return binary


def _rust(binary: str, tests: tuple[str, ...], count: int) -> tuple[int, list[str]]:
    made, faults = 0, []
    each = -(-count // len(tests))
    for test in tests:
        # A folder in memory: each input is a file.
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
        environment = {**os.environ, "PROPTEST_CASES": str(each), "TMPDIR": memory}
        words = [binary, "--exact", test, "--test-threads", "1"]
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, errors="replace"
        )
        if done.returncode or not re.search(r"\b1 passed", done.stdout):
            faults.append(f"{test}: {(done.stdout + done.stderr)[-2000:]}")
        else:
            made += each
    return made, faults


def _python(name: str, count: int, start: int) -> tuple[int, list[str]]:
    """In a process of its own, which may end in any way."""
    with tempfile.NamedTemporaryFile() as last:
        words = [sys.executable, "-W", "ignore", "-m", __name__, name, str(count), str(start)]
        if name == "calls":
            words[4] = calls.__name__
            words = [*words[:5], str(count), str(start), last.name]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        if done.returncode < 0:
            done.stderr += f" at {Path(last.name).read_text()}"
    if done.returncode or done.stdout.split()[-1:] != [str(count)]:
        return 0, [f"inputs from {start}, exit status {done.returncode}: {done.stderr[-2000:]}"]
    return count, []


# ---- the inputs ----

_ROW = {
    "prompt": "p",
    "chosen": [{"role": "user", "content": "c\u00e9"}],
    "rejected": "r",
    "n": -1.5e3,
}
_BITS = [
    b"", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b"\r", b" ", b"\0", b"\xff", b"\xef\xbb\xbf",
    b"1", b"-", b"e999", b"9" * 30, b"9" * 500, b"null", b"NaN", b"Infinity", b"\\ud800", b"\\udc00", b"[" * 300,
    b'{"a":' * 300, b"\x1f\x8b", b"BZh", b'"prompt"', b"//", b"true",
]  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some places changed, cut or copied."""
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        place, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        kind = draw.randrange(4)
        if kind == 0:
            content = content[:place] + draw.choice(_BITS) + content[place:]
        elif kind == 1:
            content = content[:place] + draw.choice(_BITS) + content[place + draw.randrange(3) :]
        elif kind == 2:
            content = content[:place] + content[place:end] + content[place:]
        else:
            content = content[:place] + content[min(end, place + 20) :]
    return content


def json_file(draw: random.Random) -> bytes:
    """A file of rows, perhaps damaged."""
    texts = [json.dumps({**_ROW, "x": draw.random()}).encode() for _ in range(draw.randrange(1, 4))]
    if draw.random() < 0.5:
        content = b"[" + draw.choice((b",", b",\n", b" , ")).join(texts) + b"]"
    else:
        content = b"".join(text + draw.choice((b"\n", b"\r", b"\r\n", b"\n\n")) for text in texts)
    return damaged(content, draw)


def read_json(path: Path, draw: random.Random) -> None:
    """Rows or words; and where all is well, as many rows as the standard library finds."""
    content = json_file(draw)
    path = path / draw.choice(("a.json", "a.jsonl"))
    path.write_bytes(content)
    try:
        records = list(FileRecords(path))
    except UserError:
        return
    for record in records:
        assert (record.fields is None) == (record.problem is not None), record
    if all(record.problem is None for record in records):
        expected = _rows(content)
        assert expected is None or len(records) == expected, (content, len(records), expected)


def _rows(content: bytes) -> int | None:
    """By another way; None if it has no say."""
    text = content.removeprefix(b"\xef\xbb\xbf").decode()
    try:
        found = json.loads(text)
        return len(found) if isinstance(found, list) else 1
    except (ValueError, RecursionError):
        lines = re.split(r"\r\n|\n|\r", text)
        return sum(1 for line in lines if line.strip(" \t"))


def read_verdicts(path: Path, draw: random.Random) -> None:
    """The verdicts that were written, or none."""
    families = ["nf4_product", "adamw8"]
    wanted = [Verdict("cuda:0", family, 0.5, "float32", 1e-7, 1e-6) for family in families]
    file = path / "verdicts-key.json"
    if not hasattr(read_verdicts, "content"):
        verdicts.write("key", wanted)
        read_verdicts.content = file.read_bytes()  # pyright: ignore[reportFunctionMemberAccess]
    content = damaged(read_verdicts.content, draw)  # pyright: ignore[reportFunctionMemberAccess]
    file.write_bytes(content)
    found = verdicts.read("key", "cuda:0", families)
    assert found is None or found == wanted, content


def main(name: str, count: str, start: str) -> None:
    """Feeds a reader with inputs that their numbers decide."""
    import logging

    logging.disable()
    read = {"json records": read_json, "verdicts": read_verdicts}[name]
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        os.environ["ODDSMITH_CACHE_DIR"] = folder
        for number in range(int(start), int(start) + int(count)):
            try:
                read(Path(folder), random.Random(number))
            except BaseException:
                print(f"input {number}", file=sys.stderr)
                raise
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
