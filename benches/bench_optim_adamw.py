"""8-bit AdamW beside bitsandbytes, torchao and torch's fused AdamW with 32 bits: time of a step, and bytes of state.

    python benches/bench_optim_adamw.py [--repeats 7] [--threads 2] [--sizes 24 --sizes 28.2] [--record]

Sizes are powers of two of float32 elements: 16.8 M and 300 M by default. The slow peers are timed at the first size
only. Paged state is a file in the folder for temporary files; it stays in the page cache. Peers that are not installed
are left out.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import warnings

import torch
from torch import nn

from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit, optimizer_bytes
from side_by_side import Report, flags, interleave

OURS = "oddsmith"
FUSED = "torch_fused"
# Targets of a step: how many times faster than a peer at least, how many times slower at most.
FASTER = {"bitsandbytes": 20.0, "torchao": 20.0}
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
        "oddsmith_paged": lambda w: PagedAdamW8bit([w], lr=1e-3),
        "oddsmith_paged_32bit": lambda w: PagedAdamW32bit([w], lr=1e-3),
        FUSED: lambda w: torch.optim.AdamW([w], lr=1e-3, fused=True),
    }
    if slow:
        found["torch"] = lambda w: torch.optim.AdamW([w], lr=1e-3, foreach=False)
        for module in ("bitsandbytes.optim", "torchao.optim"):
            if (kind := peer(module, "AdamW8bit")) is not None:
                found[module.split(".")[0]] = lambda w, kind=kind: kind([w], lr=1e-3)
    return found


def bench(elements: int, slow: bool, repeats: int, report: Report) -> None:
    grad = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    # All share one tensor of values; only the state differs.
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
    seconds = interleave(runs, repeats, warm_up=2)
    millions = f"{elements / 1e6:.3g}"
    case = f"{millions} M fp32 elements; MB of state"
    report.case(f"adamw8bit_{millions}m", case, seconds, OURS, state)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    print(f"  bytes of state an element: {state[OURS] / elements:.3f} (at most 2.1)")
    for name, least in FASTER.items():
        if name in median:
            print(
                f"  faster than {name}: {median[name] / median[OURS]:.1f}x (at least {least:.0f}x)"
            )
    for name, most in SLOWER.items():
        print(f"  of the time of {name}: {median[OURS] / median[name]:.2f}x (at most {most}x)")
    print(f"  paged, of unpaged: {median['oddsmith_paged'] / median[OURS]:.2f}x (at most 2x)\n")
    del runs, optimizer
    gc.collect()


def main() -> None:
    parser = flags(__doc__, repeats=7)
    parser.add_argument("--sizes", type=float, action="append")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # of peers
    report = Report("bench_optim_adamw", args, ("bitsandbytes", "torchao"))
    sizes = args.sizes or ([13.0] if args.tiny else [24.0, 28.16])
    for number, size in enumerate(sizes):
        bench(int(2**size), number == 0, args.repeats, report)


if __name__ == "__main__":
    main()
