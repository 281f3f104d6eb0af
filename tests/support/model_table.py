"""docs/models.md: every architecture of the installed transformers, and the path of its batches.

`python -m support.model_table`, with `tests` on the path, tries them one by one and writes the page.
What it finds is kept in the cache folder, so that it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .architectures import SAMPLE, classes, configurations
from .model_bases import BASES
from .model_trial import differs, trial
from .paths import ROOT

__all__ = ["COLUMNS", "PAGE", "page", "rows_of", "summary"]

PAGE = ROOT / "docs" / "models.md"
COLUMNS = ("Configuration", "Path", "Why", "float32", "float32, LoRA", "bfloat16", "bfloat16, LoRA")
# Most memory of a trial, in bytes.
MEMORY = 6 << 30
PATHS = ("packed", "padded", "plain", "refused")

Record = dict[str, Any]

TEXT = """\
# Models

There is no list of supported models. Each model is tried out when a trainer takes it, and the path of its batches is
logged, kept in `trainer.path` and shown by `oddsmith inspect --model`. This page is what `make models` has found with
transformers {version}: every architecture that it has for causal language models, with the options of its default configuration.

| Path | What |
|---|---|
| packed | one row of real tokens without padding, each prompt once; the loss in the fused head |
| padded | padded batches; the loss in the fused head, without the logits of a batch |
| plain | padded batches; the loss from logits, as TRL computes it |
| refused | the trainer says that the model cannot be trained |

All paths give the same loss and gradients. {count}

## The bases that people fine-tune

{packed} of these {bases} bases are packed.

{table_of_bases}

## All architectures

A small model with random weights of each configuration is trained for two steps, with all weights and with a LoRA adapter, on the
path that oddsmith picks and on the plain path.

- `float32`: the largest distance of the two in a step's loss or gradients, which is the norm of the difference in that of the plain
  path. Where it is more than 1e-5, sharp attention has amplified rounding; behind it is what is left in `float64`, at most 1e-9.
- `bfloat16`: the distance from the plain path in `float32`, and behind it that of the plain path in `bfloat16`. Where the first
  weights leave doubt, both are the median of five models.

A dash is what was not trained.

{table}

<!-- not measured: distances of results, which depend on no machine -->

{differences}

## What was not tried

Most of these make no model of their default configuration, so nothing is known about them.

{table_of_missing}
"""


# ---- What was found ----


def folder() -> Path:
    """Where the records are kept, for the installed transformers."""
    import transformers

    cache = Path(os.environ.get("ODDSMITH_CACHE") or Path.home() / ".cache" / "oddsmith")
    return cache / "models" / f"transformers-{transformers.__version__}"


def read(name: str) -> list[Record]:
    """The records of an architecture; none if it was not tried."""
    file = folder() / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def write(name: str, records: list[Record]) -> None:
    """Keep the records of an architecture."""
    folder().mkdir(parents=True, exist_ok=True)
    file = folder() / f"{name}.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps(records, indent=1), encoding="utf-8")
    part.replace(file)


def measured(records: list[Record]) -> bool:
    """Whether nothing is left to try."""
    return bool(records) and all(record.get("measured", False) for record in records)


class Worker:
    """
    A process that tries architectures, one after another. A trial that takes too long, or breaks the
    process, costs the process, and the next one gets another.

    Args:
        trained (`bool`): Train small models, too.
        seconds (`float`): Most processor time of a trial.
    """

    def __init__(self, trained: bool, seconds: float) -> None:
        self.trained, self.seconds = trained, seconds
        self._process: Any = None
        self._pipe: Any = None

    def try_out(self, name: str) -> None:
        """Try an architecture, and keep what was found."""
        before = read(name)
        if self._process is None:
            self._start()
        process: Any = self._process
        self._pipe.send(name)
        while not self._pipe.poll(0.25):
            if _memory_of(process.pid) > MEMORY:
                process.kill()
        try:
            self._pipe.recv()
        except EOFError:
            process.join()
            code, self._process = process.exitcode, None
            if self.trained and not before:  # its path may need less
                alone = Worker(False, self.seconds)
                alone.try_out(name)
                alone.close()
                before = read(name)
            write(name, _lost(name, before, _ended(code, self.seconds), self.trained))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.join()

    def _start(self) -> None:
        # Else each collection in the process would go through, and copy, all that was imported here.
        gc.collect()
        gc.freeze()
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._pipe, self.trained, self.seconds)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()


def _work(names: Any, other: Any, trained: bool, seconds: float) -> None:
    other.close()  # so that the end of the other process is seen here
    warnings.simplefilter("ignore")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    while True:
        try:
            name = names.recv()
        except EOFError:
            return
        # The time of the processor does not depend on what else the machine does.
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        until = int(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (until, most))
        write(name, [{**each, "measured": trained} for each in trial(name, trained)])
        names.send(name)


def _memory_of(pid: int) -> int:
    """The resident memory of a process, in bytes; 0 if it has ended, or the system does not say it."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def _ended(code: int, seconds: float) -> str:
    if code == -signal.SIGXCPU:
        return f"its trial took longer than {seconds:.0f} seconds"
    if code == -signal.SIGKILL:
        return "its trial took too much memory"
    return f"its trial ended with exit code {code}"


def _lost(name: str, before: list[Record], why: str, trained: bool) -> list[Record]:
    """The records of a trial that did not end."""
    model = classes(name)[1].__name__
    alone = {"name": name, "model": model, "case": "default", "path": "not built", "why": why}
    built = [each for each in before if each["path"] in PATHS]
    records = [{**each, "untried": why} for each in built] or [alone]
    return [{**each, "measured": trained} for each in records]


# ---- The page ----


def _cell(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= 160 else text[:157] + "..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = tuple(columns)
    return (_line(names) + _line("---" for _ in names) + "".join(map(_line, rows))).rstrip("\n")


def title(record: Record) -> str:
    """A configuration with its case."""
    case = record["case"]
    return f"`{record['name']}`" + ("" if case == "default" else f", {case}")


def _distances(record: Record) -> list[str]:
    names = ("float32", "float64", "bfloat16")
    exact, double, half = (record.get(dtype, {}) for dtype in names)
    kinds = ("full", "LoRA")
    wide = {kind: f" ({value:.1e})" for kind, value in double.items()}
    return [
        f"{exact[kind]:.1e}{wide.get(kind, '')}" if kind in exact else "-" for kind in kinds
    ] + ["{:.1e} ({:.1e})".format(*half[kind]) if kind in half else "-" for kind in kinds]


def _why(record: Record) -> str:
    said = [record["why"]] if record["why"] else []
    said += [f"for {record['limits']}"] if "limits" in record else []
    said += [f"not trained: {record['untried']}"] if "untried" in record else []
    said += [f"{kind}: {why}" for kind, why in sorted(record.get("failed", {}).items())]
    return _cell("; ".join(said))


def summary(paths: Iterable[str]) -> str:
    """How many of the rows take each path."""
    counts = Counter(paths)
    parts = [f"{counts[path]} {path}" for path in PATHS if counts[path]]
    total = sum(counts[path] for path in PATHS)
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1] if parts else ""]))
    return f"Of the {total} models below, {listed}." if parts else "None was tried yet."


def page(records: list[Record], version: str) -> str:
    """The text of docs/models.md."""
    built = [each for each in records if each["path"] in PATHS]
    missing = [each for each in records if each["path"] not in PATHS]
    known: dict[Any, Record] = {(each["name"], each["case"]): each for each in built}
    bases = [(base, known[key]) for base, *key_ in BASES for key in [tuple(key_)] if key in known]
    wrong = [title(each) for each in built if differs(each)]
    trained = sum(bool(each.get("float32")) for each in built)
    said = f"{trained} of the {len(built)} were trained, and none differs by more than rounding."
    if not trained:
        said = "None was trained yet, so the distances are missing."
    if wrong:
        said = f"More than rounding apart: {', '.join(wrong)}."
    return TEXT.format(
        version=version,
        count=summary(each["path"] for each in built),
        packed=sum(each["path"] == "packed" for _, each in bases),
        bases=len(bases),
        table_of_bases=_table(
            ("Base", "Configuration", "Path", "Why"),
            ([base, title(each), each["path"], _why(each)] for base, each in bases),
        ),
        table=_table(
            COLUMNS,
            ([title(each), each["path"], _why(each), *_distances(each)] for each in built),
        ),
        differences=said,
        table_of_missing=_table(
            ("Configuration", "Why"), ([title(each), _why(each)] for each in missing)
        ),
    )


def rows_of(text: str, columns: tuple[str, ...] = COLUMNS) -> list[dict[str, str]]:
    """The rows of the page's table with some columns."""
    head = re.escape(_line(columns))
    found = re.search(rf"^{head}\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None, columns
    lines = found[1].splitlines()
    split = (re.split(r"(?<!\\) \| ", line.strip()[2:-2]) for line in lines)
    return [dict(zip(columns, map(str.strip, cells), strict=True)) for cells in split]


def _order(names: Iterable[str]) -> list[str]:
    """The bases first, then what CI runs, then the others."""
    bases = {name for _, name, _ in BASES}
    return sorted(names, key=lambda name: (name not in bases, name not in SAMPLE, name))


def main() -> None:
    """Try what was not tried yet, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="configurations with this text in their names")
    parser.add_argument("--again", action="store_true", help="try again what is known")
    parser.add_argument("--paths", action="store_true", help="the paths alone, without training")
    parser.add_argument("--write", action="store_true", help="write the page of what is known")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="most processor time for an architecture"
    )
    args = parser.parse_args()
    names = configurations()
    wanted = [name for name in _order(names) if args.only in name]
    if not args.write:
        worker = Worker(not args.paths, args.seconds)
        for name in wanted:
            known = read(name)
            if args.again or not (known if args.paths else measured(known)):
                worker.try_out(name)
                for each in read(name):
                    print(title(each), each["path"], *_distances(each), flush=True)
        worker.close()
    import transformers

    later = {"model": "", "case": "default", "path": "not tried", "why": "not reached yet"}
    records = [
        each
        for name in sorted(names, key=str.lower)
        for each in read(name) or [{"name": name, **later}]
    ]
    PAGE.write_text(page(records, transformers.__version__), encoding="utf-8")
    print(f"{PAGE}: {len(records)} models", file=sys.stderr)


if __name__ == "__main__":
    main()
