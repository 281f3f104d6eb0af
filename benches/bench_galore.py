"""GaLore beside galore-torch and AdamW: a refresh of the basis, a whole step, and its memory.

    python benches/bench_galore.py [--repeats 5] [--threads 2] [--rank 128] [--skip-svd]

Refresh: the randomised range finder, cold and from the last basis, beside the SVD that galore-torch
takes. Step: GaLoreAdamW8bit on one matrix, beside its two bare projection products, torch's fused
fp32 AdamW, and galore-torch's GaLoreAdamW where it is installed. `amortised` adds a refresh every
200 steps. Needs galore-torch and bitsandbytes for the peers; without them they are left out.
"""

from __future__ import annotations

import argparse
import importlib
import statistics

import torch
from torch import nn

from oddsmith.optim import AdamW8bit, GaLoreAdamW, GaLoreAdamW8bit, optimizer_bytes
from oddsmith.optim.low_rank.projection import exact_bases, generator_for, random_bases
from side_by_side import interleave, report, versions

SHAPES = ((1024, 4096), (4096, 4096))
GAP = 200


def gradient(rows: int, columns: int) -> torch.Tensor:
    """A matrix whose singular values fall off, as a gradient's do, over a floor of noise."""
    torch.manual_seed(3)
    width = 256
    scales = torch.arange(1, width + 1) ** -0.7
    return (torch.randn(rows, width) * scales) @ torch.randn(width, columns) + 0.05 * torch.randn(
        rows, columns
    )


def peer(name: str):
    try:
        return getattr(importlib.import_module("galore_torch"), name)
    except ImportError as error:
        print(f"galore-torch is left out: {error}")
        return None


def bench_refresh(rows, columns, rank, args, used) -> float:
    """Seconds of a refresh from the last basis."""
    grad = gradient(rows, columns)
    generator = generator_for(grad.device, 1)
    old = random_bases(grad + 0.1 * torch.randn_like(grad), rank, generator)[1]
    runs = {
        "from the last basis": lambda: random_bases(grad, rank, generator, right=old),
        "cold": lambda: random_bases(grad, rank, generator),
    }
    seconds = interleave(runs, args.repeats)
    if not args.skip_svd:
        # What galore-torch's get_orthogonal_matrix does; too long to repeat as often.
        svd = interleave({"svd": lambda: exact_bases(grad, rank)}, 1, warm_up=0)
        seconds["galore-torch's SVD"] = svd["svd"]
    title = f"refresh, {rows} x {columns}, rank {rank}"
    report("galore", title, seconds, {}, "from the last basis", args.threads, used)
    # What the basis keeps of the gradient, beside the best there is.
    right = random_bases(grad, rank, generator, right=old)[1]
    kept = (grad @ right.T).norm() / grad.norm()
    print(f"  kept of the gradient's norm: {kept:.4f}", end="")
    if not args.skip_svd and rows < columns:
        best = (grad @ exact_bases(grad, rank)[1].T).norm() / grad.norm()
        print(f", by the SVD {best:.4f}", end="")
    print("\n")
    return statistics.median(seconds["from the last basis"])


def bench_step(rows, columns, rank, refresh, args, used) -> None:
    grad = gradient(rows, columns)
    low_rank = {"rank": rank, "update_proj_gap": 10**9}

    def stepper(make):
        weight = nn.Parameter(torch.randn(rows, columns))
        weight.grad = grad
        optimizer = make(weight)
        optimizer.step()
        return optimizer

    ours = {
        "GaLoreAdamW8bit": lambda w: GaLoreAdamW8bit([{"params": [w], **low_rank}], lr=1e-3),
        "GaLoreAdamW": lambda w: GaLoreAdamW([{"params": [w], **low_rank}], lr=1e-3),
    }
    makers = {**ours, "torch AdamW, fused": lambda w: torch.optim.AdamW([w], lr=1e-3, fused=True)}
    makers["AdamW8bit"] = lambda w: AdamW8bit([w], lr=1e-3)
    if not args.skip_svd and (theirs := peer("GaLoreAdamW")) is not None:
        extra = {**low_rank, "scale": 0.25, "proj_type": "std"}
        makers["galore-torch AdamW"] = lambda w: theirs(
            [{"params": [w], **extra}], lr=1e-3, no_deprecation_warning=True
        )
    optimizers = {name: stepper(make) for name, make in makers.items()}
    # galore-torch keeps its basis outside the state's tensors: counting them would flatter it.
    state = {
        name: optimizer_bytes(optimizer)
        for name, optimizer in optimizers.items()
        if not name.startswith("galore-torch")
    }
    runs = {name: optimizer.step for name, optimizer in optimizers.items()}
    basis = exact_like(rows, columns, rank)
    weight = torch.randn(rows, columns)

    def products():
        if rows >= columns:
            weight.addmm_(grad @ basis.T, basis, alpha=1e-9)
        else:
            weight.addmm_(basis, basis.T @ grad, alpha=1e-9)

    runs["two bare products"] = products
    seconds = interleave(runs, args.repeats, warm_up=2)
    seconds["GaLoreAdamW8bit, amortised"] = [
        each + refresh / GAP for each in seconds["GaLoreAdamW8bit"]
    ]
    title = f"step, {rows} x {columns}, rank {rank}; MB of state"
    report("galore", title, seconds, state, "GaLoreAdamW8bit, amortised", args.threads, used)
    small, large = sorted((rows, columns))
    formula = 4 * small * rank + 2 * large * rank
    print(f"  state by the formula, fp32 basis and 8-bit moments: {formula / 1e6:.2f} MB")
    whole = statistics.median(seconds["GaLoreAdamW8bit, amortised"])
    bare = statistics.median(seconds["two bare products"])
    for adam in ("AdamW8bit", "torch AdamW, fused"):
        if adam in seconds:
            other = statistics.median(seconds[adam])
            ratio = whole / (other + bare)
            print(f"  amortised step / ({adam} + two bare products) = {ratio:.2f}")
    print()


def exact_like(rows: int, columns: int, rank: int) -> torch.Tensor:
    small = torch.linalg.qr(torch.randn(min(rows, columns), rank)).Q
    return small.T.contiguous() if rows >= columns else small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument(
        "--skip-svd", action="store_true", help="leave the SVD out, which takes up to a minute"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    used = versions("torch", "oddsmith")
    for rows, columns in SHAPES:
        refresh = bench_refresh(rows, columns, args.rank, args, used)
        bench_step(rows, columns, args.rank, refresh, args, used)


if __name__ == "__main__":
    main()
