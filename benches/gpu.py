"""Training steps and kernels on one card, beside their peers, with nothing to download.

    python benches/gpu.py [--minutes 7] [--only mistral-7b kernels ...] [--csv benches/gpu.csv]
    python benches/gpu.py --tiny --device cpu        # the same code in a minute, to try it out

Steps are those of real trainers, of random weights of real shapes made on the card: Mistral-7B and
Llama-3-8B in NF4 with LoRA of rank 16 on all seven projections, as in the article this is measured
against (batch 2, 4 accumulated, at most 1,024 tokens, gradient checkpointing, bfloat16), and all of
Qwen2.5-0.5B. Lengths of prompts and answers are drawn from those of 805 AlpacaEval pairs under
Mistral's tokenizer. One process holds all trainers of a model; they share its weights and codes and
take turns, a few steps each. Peak memory is what a trainer would need alone: weights and its
optimiser's state, and what a step adds to what is allocated when it begins.

Peers take part where they can be imported: TRL's trainer (on bitsandbytes' layers if those can be too),
its loop with Liger's ORPO loss, and with cut-cross-entropy. GB/s and TFLOP/s count the bytes and
products that the task cannot do without, and are set against a copy and a matrix product of the same
minute; what fits into the card's cache may go beyond that copy.

A machine without a package registry needs this folder and, beside torch 2.11, transformers, peft, accelerate
and datasets, the wheels of oddsmith (`pip wheel --no-deps --no-build-isolation .`; 3 MB), bitsandbytes 0.50.2
(43 MB), trl 1.16.0 (1 MB), liger-kernel 0.8.5 (1 MB) and cut-cross-entropy 25.1.1 (0.1 MB), to be
installed with `pip install --no-deps`.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import torch

from gpu_bench import Bench, print_table, write_csv
from gpu_kernels import kernels
from gpu_models import SHAPES, TINY
from gpu_steps import steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script out")
    parser.add_argument(
        "--minutes", type=float, default=7, help="what has not begun then is left out"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--repeats", type=int, default=11, help="runs of each kernel")
    parser.add_argument("--only", nargs="+", choices=[*SHAPES, *TINY, "kernels"])
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny --device cpu tries the script out")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import disable_progress_bars
    from transformers.utils.logging import set_verbosity_error

    disable_progress_bars()
    set_verbosity_error()
    # Reports on the rows, of every trainer anew; why batches are not packed is to be seen.
    for name in ("oddsmith.training.row_hooks", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    deadline = time.perf_counter() + 60 * args.minutes
    bench = Bench(device, deadline, 2 if args.tiny else args.repeats)
    shapes = TINY if args.tiny else SHAPES
    first, *others = shapes
    written = 0
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
        write_csv(args.csv, bench.rows[written:])  # as far as it came, if it is cut off later
        written = len(bench.rows)
        if bench.cuda:
            torch.cuda.empty_cache()
    print_table(bench.rows)
    if bench.failed:
        print(f"failed: {'; '.join(bench.failed)}")


if __name__ == "__main__":
    main()
