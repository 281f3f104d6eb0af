"""GaLore beside galore-torch and AdamW: a refresh of the basis, a whole step, and bytes of state.

    python benches/bench_optim_low_rank.py [--repeats 5] [--threads 2] [--rank 128] [--skip-svd] [--record]

Refresh: the randomised range finder, from the last basis and without one (`cold`), beside the SVD of galore-torch. Step:
GaLoreAdamW8bit on one matrix, beside its two projection products alone, torch's fused AdamW, and galore-torch's
GaLoreAdamW. `amortised` adds the time of a refresh every 200 steps. Peers that are not installed are left out.
"""

from __future__ import annotations

import importlib
import statistics

import torch
from torch import nn

from oddsmith.optim import AdamW8bit, GaLoreAdamW, GaLoreAdamW8bit, optimizer_bytes
from oddsmith.optim.low_rank.projection import exact_bases, generator_for, random_bases
from side_by_side import Report, flags, interleave

SHAPES = ((1024, 4096), (4096, 4096))
TINY = ((24, 96), (96, 96))
GAP = 200
# A step with its share of a refresh.
AMORTISED = "oddsmith_8bit_amortised"


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


def bench_refresh(rows, columns, rank, args, report: Report) -> float:
    """Seconds of a refresh from the last basis."""
    grad = gradient(rows, columns)
    generator = generator_for(grad.device, 1)
    old = random_bases(grad + 0.1 * torch.randn_like(grad), rank, generator)[1]
    runs = {
        "oddsmith": lambda: random_bases(grad, rank, generator, right=old),
        "oddsmith_cold": lambda: random_bases(grad, rank, generator),
    }
    seconds = interleave(runs, args.repeats)
    if not args.skip_svd:
        # What galore-torch's get_orthogonal_matrix does; too long to repeat as often.
        svd = interleave({"svd": lambda: exact_bases(grad, rank)}, 1, warm_up=0)
        seconds["galore_torch"] = svd["svd"]
    title = f"refresh, {rows} x {columns}, rank {rank}"
    report.case(f"galore_refresh_{rows}x{columns}", title, seconds, "oddsmith")
    # What the basis keeps of the gradient, beside the best there is.
    right = random_bases(grad, rank, generator, right=old)[1]
    kept = (grad @ right.T).norm() / grad.norm()
    print(f"  kept of the gradient's norm: {kept:.4f}", end="")
    if not args.skip_svd and rows < columns:
        best = (grad @ exact_bases(grad, rank)[1].T).norm() / grad.norm()
        print(f", by the SVD {best:.4f}", end="")
    print("\n")
    return statistics.median(seconds["oddsmith"])


def bench_step(rows, columns, rank, refresh, args, report: Report) -> None:
    grad = gradient(rows, columns)
    low_rank = {"rank": rank, "update_proj_gap": 10**9}

    def stepper(make):
        weight = nn.Parameter(torch.randn(rows, columns))
        weight.grad = grad
        optimizer = make(weight)
        optimizer.step()
        return optimizer

    ours = {
        "oddsmith_8bit": lambda w: GaLoreAdamW8bit([{"params": [w], **low_rank}], lr=1e-3),
        "oddsmith_32bit": lambda w: GaLoreAdamW([{"params": [w], **low_rank}], lr=1e-3),
    }
    makers = {**ours, "torch_adamw_fused": lambda w: torch.optim.AdamW([w], lr=1e-3, fused=True)}
    makers["oddsmith_adamw8bit"] = lambda w: AdamW8bit([w], lr=1e-3)
    if not args.skip_svd and (theirs := peer("GaLoreAdamW")) is not None:
        extra = {**low_rank, "scale": 0.25, "proj_type": "std"}
        makers["galore_torch"] = lambda w: theirs(
            [{"params": [w], **extra}], lr=1e-3, no_deprecation_warning=True
        )
    optimizers = {name: stepper(make) for name, make in makers.items()}
    # galore-torch keeps its basis outside the state's tensors: counting them would flatter it.
    state = {
        name: optimizer_bytes(optimizer)
        for name, optimizer in optimizers.items()
        if not name.startswith("galore_torch")
    }
    runs = {name: optimizer.step for name, optimizer in optimizers.items()}
    basis = exact_like(rows, columns, rank)
    weight = torch.randn(rows, columns)

    def products():
        if rows >= columns:
            weight.addmm_(grad @ basis.T, basis, alpha=1e-9)
        else:
            weight.addmm_(basis, basis.T @ grad, alpha=1e-9)

    runs["products"] = products
    seconds = interleave(runs, args.repeats, warm_up=2)
    seconds[AMORTISED] = [each + refresh / GAP for each in seconds["oddsmith_8bit"]]
    title = f"step, {rows} x {columns}, rank {rank}; MB of state"
    report.case(f"galore_step_{rows}x{columns}", title, seconds, AMORTISED, state)
    small, large = sorted((rows, columns))
    formula = 4 * small * rank + 2 * large * rank
    print(f"  state by the formula, fp32 basis and 8-bit moments: {formula / 1e6:.2f} MB")
    whole = statistics.median(seconds[AMORTISED])
    bare = statistics.median(seconds["products"])
    for adam in ("oddsmith_adamw8bit", "torch_adamw_fused"):
        if adam in seconds:
            other = statistics.median(seconds[adam])
            ratio = whole / (other + bare)
            print(f"  amortised step / ({adam} + two bare products) = {ratio:.2f}")
    print()


def exact_like(rows: int, columns: int, rank: int) -> torch.Tensor:
    small = torch.linalg.qr(torch.randn(min(rows, columns), rank)).Q
    return small.T.contiguous() if rows >= columns else small


def main() -> None:
    parser = flags(__doc__, repeats=5)
    parser.add_argument("--rank", type=int, help="of the projection (default 128)")
    parser.add_argument(
        "--skip-svd", action="store_true", help="leave the SVD out, which takes up to a minute"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rank = args.rank or (8 if args.tiny else 128)
    report = Report("bench_optim_low_rank", args, ("galore-torch",))
    for rows, columns in TINY if args.tiny else SHAPES:
        refresh = bench_refresh(rows, columns, rank, args, report)
        bench_step(rows, columns, rank, refresh, args, report)


if __name__ == "__main__":
    main()
