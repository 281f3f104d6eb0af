"""Attention over a packed row on the CPU: libtorch's flash kernels beside tiles of queries, forward and backward.

    python benches/bench_packing.py [--repeats 5] [--threads 2] [--record]

`flash` is what a causal layer gets, `window` and `short_window` (256 tokens) the same kernels for a layer with one.
`tiles` is the computation of `flash` by the code for layers that no flash kernel knows; `softcap` and `both`, a
softcap and a window, are such layers. A row has pairs with a shared prompt: sequences of 1,024 tokens in a row of
2,048 tokens, and of 2,048 tokens in longer ones, so that the window of 1,024 tokens matters there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from oddsmith.packing.attention_cpu import PackedFlash
from oddsmith.packing.attention_tiles import PackedTiles, Rule
from oddsmith.packing.pattern import CAUSAL, Pattern, Segments
from side_by_side import Report, flags, interleave

HEADS, KEY_HEADS = 8, 2
WINDOW, SHORT_WINDOW, SOFTCAP = 1024, 256, 50.0


def segments_of(tokens: int) -> Segments:
    """Pairs of a third prompt and two answers, as many as there is room for."""
    longest = min(2048, tokens // 2)
    pair = (longest // 3, longest - longest // 3, longest - longest // 3)
    count, rest = divmod(tokens, sum(pair))
    return (pair,) * count + (((0, rest - rest // 2, rest // 2),) if rest > 1 else ())


def runs_of(tokens: int, width: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    segments = segments_of(tokens)
    count = sum(map(sum, segments))
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, count, width).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    d_out = torch.randn(1, HEADS, count, width).to(dtype)
    scale = 1.0 / math.sqrt(width)

    def step(attend: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(attend(query, key, value), (query, key, value), d_out)

    def flash(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return PackedFlash.apply(q, k, v, segments, scale, pattern)

    def tiles(rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return PackedTiles.apply(q, k, v, None, segments, rule)

    window = Pattern(window=WINDOW).within(max(shared + own for shared, own, _ in segments))
    rules = {
        "tiles": Rule(CAUSAL, scale),
        "softcap": Rule(CAUSAL, scale, SOFTCAP),
        "both": Rule(window, scale, SOFTCAP),
    }
    found: dict[str, Callable[[], object]] = {
        "flash": partial(step, partial(flash, CAUSAL)),
        "window": partial(step, partial(flash, window)),
        "short_window": partial(step, partial(flash, Pattern(window=SHORT_WINDOW))),
    }
    return found | {name: partial(step, partial(tiles, rule)) for name, rule in rules.items()}


def main() -> None:
    parser = flags(str(__doc__), repeats=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("bench_packing", args, ())
    for tokens in [96] if args.tiny else args.tokens:
        for width in (16,) if args.tiny else (64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                short = str(dtype).removeprefix("torch.")
                title = f"{tokens} tokens, {HEADS} heads of {width}, {short}, forward and backward"
                seconds = interleave(runs_of(tokens, width, dtype), args.repeats)
                report.case(f"packing_{tokens}x{width}_{short}", title, seconds, "flash")


if __name__ == "__main__":
    main()
