"""8-bit AdamW beside bitsandbytes, torchao and torch's fused fp32 AdamW: a step, and what it keeps.

    python benches/bench_optim_adamw.py [--repeats 7] [--threads 2] [--sizes 24 --sizes 28.2]

Sizes are powers of two of fp32 elements: 16.8 M and 300 M by default; the slow peers are timed at the
first alone. Paged state is in a file of the folder for temporary files, in the page cache. Peers that
are not installed are left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import statistics
import warnings

import torch
from torch import nn

from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit, optimizer_bytes
from side_by_side import interleave, report, versions

OURS = "AdamW8bit"
FUSED = "torch AdamW, fused"
# What is asked of a step: at least so many times as fast as a peer, or at most so many times as slow.
FASTER = {"bitsandbytes AdamW8bit": 20.0, "torchao AdamW8bit": 20.0}
SLOWER = {FUSED: 1.2}


def peer(module: str, name: str):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        print(f"{module} is left out: {error}")
        return None


def makers(slow: bool) -> dict:
    found = {
        OURS: lambda w: AdamW8bit([w], lr=1e-3),
        "PagedAdamW8bit": lambda w: PagedAdamW8bit([w], lr=1e-3),
        "PagedAdamW32bit": lambda w: PagedAdamW32bit([w], lr=1e-3),
        FUSED: lambda w: torch.optim.AdamW([w], lr=1e-3, fused=True),
    }
    if slow:
        found["torch AdamW"] = lambda w: torch.optim.AdamW([w], lr=1e-3, foreach=False)
        for module in ("bitsandbytes.optim", "torchao.optim"):
            if (kind := peer(module, "AdamW8bit")) is not None:
                name = f"{module.split('.')[0]} AdamW8bit"
                found[name] = lambda w, kind=kind: kind([w], lr=1e-3)
    return found


def bench(elements: int, slow: bool, args: argparse.Namespace, used: str) -> None:
    grad = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    # All on one tensor of values: only the state is each one's own.
    values = torch.zeros(elements)
    runs, state = {}, {}
    for name, make in makers(slow).items():
        weight = nn.Parameter(values)
        weight.grad = grad
        optimizer = make(weight)
        optimizer.step()
        if not name.startswith("torchao"):  # its state is in subclasses of tensors
            state[name] = optimizer_bytes(optimizer)
        runs[name] = optimizer.step
    seconds = interleave(runs, args.repeats, warm_up=2)
    report(
        "adamw",
        f"{elements / 1e6:.1f} M fp32 elements; MB of state",
        seconds,
        state,
        OURS,
        args.threads,
        used,
    )
    median = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"  bytes of state an element: {state[OURS] / elements:.3f} (at most 2.1)")
    for name, least in FASTER.items():
        if name in median:
            print(
                f"  faster than {name}: {median[name] / median[OURS]:.1f}x (at least {least:.0f}x)"
            )
    for name, most in SLOWER.items():
        print(f"  of the time of {name}: {median[OURS] / median[name]:.2f}x (at most {most}x)")
    print(f"  paged, of unpaged: {median['PagedAdamW8bit'] / median[OURS]:.2f}x (at most 2x)\n")
    del runs, optimizer
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=float, action="append")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # of peers
    installed = ["torch", "oddsmith"]
    for name in ("bitsandbytes", "torchao"):
        try:
            importlib.metadata.version(name)
            installed.append(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    used = versions(*installed)
    for number, size in enumerate(args.sizes or (24.0, 28.16)):
        bench(int(2**size), number == 0, args, used)


if __name__ == "__main__":
    main()
