"""Tokenising a preference dataset, beside TRL's maps and the tokenizers library alone.

    python benches/bench_data.py [--rows 20000] [--peer-rows 2000] [--repeats 3] [--record]
    python benches/bench_data.py --memory 1000000 [--record]

The rows are conversations (AlpacaEval pairs, through a chat template) and strings (HH-RLHF, implicit prompt) from two
files in the folder `data` of `--shared`, repeated with a suffix that makes each text different. Without the folder
they are made up. The tokenizer is Mistral's, from mistral-common. Each run is a new process that loads the rows
from disk and writes its columns to disk, as the first run of a training does: `oddsmith` is `prepare_dataset`; `trl` is
the three maps of TRL's trainer, in one process and in two; `tokenizers` only encodes the texts that oddsmith encodes, on
all cores, without template, rows and disk. TRL runs on the first `--peer-rows` rows, to save time.

`--memory N` tokenises N made-up rows and runs `oddsmith inspect` on a file of them. It prints the peaks of resident
memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import installed
from side_by_side import Report, flags, show

FILES = {
    "conversations": "alpacaeval_mistral_orpo.jsonl.gz",
    "strings": "hh_harmless_test_head.jsonl.gz",
}
CONTENDERS = ("oddsmith", "tokenizers", "trl", "trl_2_processes")


def suffixed(value, suffix: str):
    """A text, or the text of every message, with a suffix."""
    if isinstance(value, str):
        return value + suffix
    return [{**message, "content": message["content"] + suffix} for message in value]


def real_rows(path: Path, count: int):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    fields = [field for field in ("prompt", "chosen", "rejected") if field in rows[0]]
    for index in range(count):
        row = rows[index % len(rows)]
        yield {field: suffixed(row[field], f" [{index}]") for field in fields}


def made_up_columns(count: int) -> dict[str, list[str]]:
    """Made-up words, about 100 characters of prompt and 160 and 120 of answers."""
    draw = random.Random(3)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(50_000)]
    text = " ".join(words)

    def piece(mean: int) -> str:
        start = draw.randrange(len(text) - 2 * mean)
        return text[start : start + draw.randint(mean // 2, 3 * mean // 2)]

    return {
        "prompt": [f"{index} {piece(100)}\n" for index in range(count)],
        "chosen": [piece(160) for _ in range(count)],
        "rejected": [piece(120) for _ in range(count)],
    }


def tokenizer_and_dataset(args: argparse.Namespace):
    from datasets import disable_caching, disable_progress_bars, load_from_disk

    from bench_training import mistral_tokenizer

    disable_caching()  # results are still written to disk
    disable_progress_bars()
    dataset = load_from_disk(args.dataset)
    dataset = dataset.select(range(min(args.rows, len(dataset))))
    return mistral_tokenizer(Path(tempfile.mkdtemp(dir=args.folder))), dataset


def run_oddsmith(tokenizer, dataset, args: argparse.Namespace) -> float:
    from oddsmith.data.dataset import prepare_dataset
    from oddsmith.data.rows import RowBuilder

    builder = RowBuilder(tokenizer, 1024)
    start = time.perf_counter()
    prepared = prepare_dataset(dataset, tokenizer, builder.tokenize_row)
    seconds = time.perf_counter() - start
    assert len(prepared) == len(dataset)
    return seconds


def run_trl(tokenizer, dataset, args: argparse.Namespace) -> float:
    from accelerate import PartialState
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
    from trl.experimental.orpo import ORPOTrainer

    PartialState()
    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.processing_class, trainer.max_length = tokenizer, 1024
    trainer.is_encoder_decoder, trainer.max_completion_length = False, None
    trainer.padding_value = tokenizer.pad_token_id
    processes = 2 if args.child == "trl_2_processes" else None
    start = time.perf_counter()
    rows = dataset.map(maybe_extract_prompt, num_proc=processes)
    template = {"processing_class": tokenizer}
    rows = rows.map(maybe_apply_chat_template, fn_kwargs=template, num_proc=processes)
    rows.map(trainer.tokenize_row, num_proc=processes)
    return time.perf_counter() - start


def run_encode_batch(tokenizer, dataset, args: argparse.Namespace) -> float:
    from oddsmith.data.chat import row_text

    seconds = 0.0
    for first in range(0, len(dataset), 1000):
        batch = dataset.select(range(first, min(first + 1000, len(dataset))))
        texts = []
        for prompt, *answers in (row_text(row, tokenizer, "row") for row in batch):
            texts += [prompt, *(prompt + answer for answer in answers)]
        start = time.perf_counter()
        encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        seconds += time.perf_counter() - start
        del encoded
    return seconds


def run_inspect(tokenizer, dataset, args: argparse.Namespace) -> float:
    """`oddsmith inspect` of the rows in a jsonl file."""
    from oddsmith import cli

    model = Path(args.folder) / "tokenizer"
    tokenizer.save_pretrained(model)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["inspect", f"{args.dataset}.jsonl", "--model", str(model)]) == 0
    return time.perf_counter() - start


def child(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer, dataset = tokenizer_and_dataset(args)
    runs = {
        "oddsmith": run_oddsmith,
        "tokenizers": run_encode_batch,
        "inspect": run_inspect,
    }
    seconds = runs.get(args.child, run_trl)(tokenizer, dataset, args)
    from side_by_side import status

    print(json.dumps({"seconds": seconds, "rows": len(dataset), "peak": status("VmHWM")}))


def run(contender: str, rows: int, dataset: Path, folder: Path) -> dict:
    command = [sys.executable, __file__, "--child", contender, f"--rows={rows}"]
    command += [f"--dataset={dataset}", f"--folder={folder}"]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    # Where a process writes what it does not cache.
    environment["TMPDIR"] = str(folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def beside_trl(args: argparse.Namespace, form: str, folder: Path, report: Report) -> None:
    from datasets import Dataset

    path, dataset = args.shared / "data" / FILES[form], folder / form
    if path.exists():
        rows = Dataset.from_list(list(real_rows(path, args.rows)))
    else:
        print(f"  {path} is not there: made-up words")
        rows = Dataset.from_dict(made_up_columns(args.rows))
        form = f"made_up_{form}"
    rows.save_to_disk(dataset)
    contenders = CONTENDERS[: 2 if not installed("trl") else 3 if args.tiny else 4]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(args.repeats):
        for name, runs in seconds.items():
            count = args.peer_rows if name.startswith("trl") else args.rows
            done = run(name, count, dataset, folder)
            runs.append(1000 * done["seconds"] / done["rows"])
            line = f"{name}, {done['rows']} rows: {done['rows'] / done['seconds']:.0f} rows/s"
            print(f"  round {index + 1}/{args.repeats}: {line}", flush=True)
    case = f"tokenise, {form} ({args.rows} rows; TRL {args.peer_rows})"
    show(f"{case}, seconds for 1,000 rows", seconds, "oddsmith")
    for name, runs in seconds.items():
        rates = [1000 / value for value in runs]
        print(f"  {name:24}{statistics.median(rates):9.0f} rows/s")
        report.add(f"tokenize_{form}_{name}_rate", case, name, "rate", "rows/s", rates)


def memory(args: argparse.Namespace, folder: Path, report: Report) -> None:
    from datasets import Dataset

    dataset = folder / "made_up"
    start = time.perf_counter()
    rows = Dataset.from_dict(made_up_columns(args.memory))
    rows.save_to_disk(dataset)
    rows.to_json(f"{dataset}.jsonl")
    print(f"  {args.memory} rows made in {time.perf_counter() - start:.0f} s", flush=True)
    for name, what in (("oddsmith", "tokenize"), ("inspect", "inspect")):
        done = run(name, args.memory, dataset, folder)
        rate = done["rows"] / done["seconds"]
        print(
            f"  {what}, {done['rows']} rows: {done['seconds']:.0f} s, {rate:.0f} rows/s, "
            f"peak {done['peak'] / 1e9:.2f} GB",
            flush=True,
        )
        key, case = f"{what}_{args.memory / 1e6:g}m_rows_oddsmith", f"{what}, {args.memory} rows"
        report.add(f"{key}_memory", case, "oddsmith", "memory", "MB", [done["peak"] / 1e6])
        report.add(f"{key}_time", case, "oddsmith", "time", "s", [done["seconds"]])


def main() -> None:
    parser = flags(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, help="rows of each form (default 20,000)")
    parser.add_argument("--peer-rows", type=int, help="rows that TRL runs on (default 2,000)")
    parser.add_argument("--forms", nargs="+", choices=tuple(FILES), default=list(FILES))
    parser.add_argument(
        "--memory", type=int, default=0, help="rows of the run that measures memory"
    )
    default = os.environ.get("ODDSMITH_SHARED", Path(__file__).parents[2] / "shared")
    parser.add_argument("--shared", type=Path, default=default, help="holds the folder data")
    parser.add_argument("--child", choices=(*CONTENDERS, "inspect"), help=argparse.SUPPRESS)
    parser.add_argument("--dataset", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows = args.rows or (60 if args.tiny else 20_000)
    args.peer_rows = args.peer_rows or (20 if args.tiny else 2_000)
    if args.child:
        child(args)
        return
    args.threads = os.cpu_count() or 1  # those of the tokenizers
    report = Report("bench_data", args, ("trl", "transformers", "tokenizers", "datasets"))
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            memory(args, Path(folder), report)
            return
        for form in args.forms:
            beside_trl(args, form, Path(folder), report)


if __name__ == "__main__":
    main()
