"""Training steps and kernels on one GPU, beside their peers. Nothing is downloaded.

    python -m benches.gpu --json gpu.json             # ten minutes; the file is what to post
    python -m benches.gpu [--minutes 7] [--only mistral-7b kernels ...] [--record [FILE]]
    python -m benches.gpu --tiny --device cpu        # the same code in a minute, to try it out

The steps are those of real trainers; the models have real shapes and random weights, made on the GPU: Mistral-7B and
Llama-3-8B in NF4 with LoRA of rank 16 on all seven projections (batch 2, 4 accumulated, at most 1,024 tokens, gradient
checkpointing, bfloat16: the settings of the article whose hours are printed for comparison), and all weights of
Qwen2.5-0.5B. Lengths of prompts and answers are drawn from those of 805 AlpacaEval pairs under Mistral's tokenizer. One
process holds all trainers of a model; they share its weights and codes and take turns of a few steps. Peak memory is
what a trainer would need alone: weights, its optimiser's state, and the rise during a step.

Peers take part if they are installed: TRL's trainer (on bitsandbytes' layers if that is installed too), its loop with
Liger's ORPO loss, and with cut-cross-entropy. GB/s and TFLOP/s count the bytes and products that the task needs at
least. Their share of the peak is relative to a copy and a matrix product that are timed in the same run; data that fits
into the GPU's cache may exceed the copy.

A machine without a package registry needs the folder benches/ and, beside torch 2.11, transformers, peft, accelerate
and datasets, the wheels of oddsmith (`pip wheel --no-deps --no-build-isolation .`; 3 MB), bitsandbytes 0.50.2 (43 MB), trl
1.16.0 (1 MB), liger-kernel 0.8.5 (1 MB) and cut-cross-entropy 25.1.1 (0.1 MB), installed with `pip install --no-deps`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

import torch

from ..results import Recorder, installed, record_flag, versions
from .bench import PACKAGES, Bench, machine, print_table
from .kernels import kernels
from .models import SHAPES, TINY
from .steps import steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script out")
    parser.add_argument(
        "--minutes",
        type=float,
        default=7,
        help="parts that have not begun after this time are left out",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--repeats", type=int, default=11, help="runs of each kernel")
    parser.add_argument("--only", nargs="+", choices=[*SHAPES, *TINY, "kernels"])
    parser.add_argument("--json", type=Path, help="a file for all rows, to post in an issue")
    record_flag(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny --device cpu tries the script out")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import disable_progress_bars
    from transformers.utils.logging import set_verbosity_error

    disable_progress_bars()
    set_verbosity_error()
    # Every trainer would report on the rows again; other lines, such as why batches are padded, stay.
    for name in ("oddsmith.training.row_hooks", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    deadline = time.perf_counter() + 60 * args.minutes
    # Rows are written as they are measured, so a run that is cut off keeps them.
    recorder = Recorder("gpu", installed(*PACKAGES), machine(device), args.record)
    bench = Bench(device, deadline, 2 if args.tiny else args.repeats, recorder)
    shapes = TINY if args.tiny else SHAPES
    first, *others = shapes
    # What matters most comes first.
    for name in args.only or [first, "kernels", *others]:
        if bench.out_of_time:
            print(f"{name}: no time left")
            continue
        print(f"{name} ..", flush=True)
        if name == "kernels":
            kernels(bench, args.tiny)
        else:
            shape = {**SHAPES, **TINY}[name]
            small = (0.05, 1, 1)
            steps(bench, name, shape, *(small if args.tiny else (1.0, args.rounds, 2)))
        if bench.cuda:
            torch.cuda.empty_cache()
    print_table(bench.rows)
    if args.json:
        report = {"machine": machine(device), "packages": versions(installed(*PACKAGES))}
        report |= {"failed": bench.failed, "rows": bench.rows}
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    if bench.failed:
        print(f"failed: {'; '.join(bench.failed)}")


if __name__ == "__main__":
    main()
