"""NF4 beside bitsandbytes: quantising, dequantising, the 4-bit linear layer, and decoding one token.

    python benches/bench_quant.py [--repeats 7] [--threads 2] [--pool] [--only dequantize] [--record]

Weights of 4096 x 4096 and 4096 x 14336, block size 64. The linear layer takes 512 tokens forward and backward, beside the
same in `float32` with an unpacked weight. `write` only fills a result of that size. Decoding is one token at a time;
bitsandbytes has two ways: from a dequantised weight, which its layer takes whenever a gradient may be needed, and, on
processors with bfloat16 units, an evaluation kernel that rounds tokens, scales and products to bfloat16.

Large results are fresh memory, whose pages the system maps one by one. --pool takes the results of all implementations
from oddsmith's pool, as `ORPOTrainer` does while it trains.

On a processor with bfloat16 units `ONEDNN_MAX_CPU_ISA=AVX2` shows what happens without them.
"""

from __future__ import annotations

import contextlib

import bitsandbytes as bnb
import bitsandbytes.functional as peer
import torch
import torch.nn.functional as F

from oddsmith import functional
from oddsmith.integrations.cpu_memory import pooled_memory
from oddsmith.nn import Linear4bit
from side_by_side import Report, flags, interleave

SHAPES = ((4096, 4096), (4096, 14336))
TINY = ((64, 128),)
TOKENS = 512
# Calls in a run, where one is too short to time.
DECODED = 20


def quantise(weight):
    packed, state = functional.quantize_nf4(weight)
    codes, other = peer.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(packed, codes) and torch.equal(state.absmax, other.absmax)
    return {
        "oddsmith": lambda: functional.quantize_nf4(weight),
        "oddsmith_double_quant": lambda: functional.quantize_nf4(weight, double_quant=True),
        "bitsandbytes": lambda: peer.quantize_4bit(weight, quant_type="nf4"),
    }


def dequantise(weight):
    packed, state = functional.quantize_nf4(weight)
    codes, other = peer.quantize_4bit(weight, quant_type="nf4")
    back = functional.dequantize_nf4(packed, state)
    assert torch.equal(back, peer.dequantize_4bit(codes, other))
    return {
        "oddsmith": lambda: functional.dequantize_nf4(packed, state),
        "bitsandbytes": lambda: peer.dequantize_4bit(codes, other),
        "write": lambda: torch.empty_like(weight).fill_(1.0),
    }


def layers(weight):
    """The same codes in both layers; plain scales, for nested ones differ between the two."""
    rows, columns = weight.shape
    options = {"bias": False, "compute_dtype": weight.dtype, "compress_statistics": False}
    ours = Linear4bit(columns, rows, device="meta", **options)
    packed, state = functional.quantize_nf4(weight)
    ours._replace_weight(packed, state)
    theirs = bnb.nn.Linear4bit(columns, rows, quant_type="nf4", device="meta", **options)
    theirs.weight = bnb.nn.Params4bit(
        weight.clone(), compress_statistics=False, quant_type="nf4", module=theirs
    )
    return ours, theirs.to("cpu")


def close(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        error = (a.float() - b.float()).abs().max() / b.float().abs().max()
        assert error < 8 * torch.finfo(dtype).eps + 1e-5, f"off by {error}"


def linear(weight):
    ours, theirs = layers(weight)
    rows, columns = weight.shape
    x = torch.randn(TOKENS, columns).to(weight.dtype).requires_grad_()
    upstream = torch.randn(TOKENS, rows).to(weight.dtype)
    full = functional.dequantize_nf4(ours.weight, ours.quant_state, torch.float32)
    wide, wide_upstream = x.detach().float().requires_grad_(), upstream.float()

    def step(layer, x, upstream):
        out = layer(x)
        return out.detach(), *torch.autograd.grad(out, x, upstream)

    runs = {
        "oddsmith": lambda: step(ours, x, upstream),
        "bitsandbytes": lambda: step(theirs, x, upstream),
        "dense_float32": lambda: step(lambda x: F.linear(x, full), wide, wide_upstream),
    }
    close(runs["oddsmith"](), runs["dense_float32"](), weight.dtype)
    return runs


def decode(weight):
    ours, theirs = layers(weight)
    _, evaluated = layers(weight)
    tokens = torch.randn(DECODED, 1, weight.shape[1]).to(weight.dtype)
    full = functional.dequantize_nf4(ours.weight, ours.quant_state)

    def each(layer):
        with torch.no_grad():
            return [layer(token) for token in tokens]

    runs = {
        "oddsmith": lambda: each(ours),
        "bitsandbytes": lambda: each(theirs.train()),
        "dense": lambda: each(lambda x: F.linear(x, full)),
    }
    if peer.has_avx512bf16():
        runs["bitsandbytes_evaluation"] = lambda: each(evaluated.eval())
    truth = [F.linear(token.double(), full.double()) for token in tokens]
    for name, run in runs.items():
        worst = max((a.double() - b).abs().max() / b.abs().max() for a, b in zip(run(), truth))
        print(f"  {name}: largest error {worst:.1e} of the largest value")
        assert worst < 0.05, name
    return runs


# What is measured, the id of its rows, and their title.
CASES = {
    "quantize": (quantise, "quantize", "weight {shape} {dtype}"),
    "dequantize": (dequantise, "dequantize", "weight {shape} to {dtype}"),
    "linear": (
        linear,
        f"linear_{TOKENS}_tokens",
        f"weight {{shape}}, {TOKENS} tokens in {{dtype}}, forward and backward",
    ),
    "decode": (
        decode,
        "linear_1_token",
        f"weight {{shape}}, {DECODED} times one token in {{dtype}}",
    ),
}


def main() -> None:
    parser = flags(__doc__, repeats=7)
    parser.add_argument("--pool", action="store_true", help="memory from oddsmith's pool")
    parser.add_argument("--only", choices=CASES, action="append", help="leave the others out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], action="append")
    parser.add_argument("--shape", type=int, choices=range(len(SHAPES)), help="one of the shapes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("bench_quant", args, ("bitsandbytes",))
    shapes = SHAPES if args.shape is None else SHAPES[args.shape : args.shape + 1]
    pool = pooled_memory(torch.device("cpu")) if args.pool else contextlib.nullcontext()
    with pool:
        for name in args.only or CASES:
            make, key, title = CASES[name]
            for shape in TINY if args.tiny else shapes:
                for dtype in args.dtype or ["float32", "bfloat16"]:
                    torch.manual_seed(7)
                    weight = (torch.randn(shape) * 0.02).to(getattr(torch, dtype))
                    case = title.format(shape=" x ".join(map(str, shape)), dtype=dtype)
                    case = f"NF4 {name}: {case}{', reused memory' if args.pool else ''}"
                    size = "x".join(map(str, shape))
                    row = f"nf4_{key}_{size}_{dtype}{'_reused' if args.pool else ''}"
                    seconds = interleave(make(weight), args.repeats)
                    report.case(row, case, seconds, "oddsmith")


if __name__ == "__main__":
    main()
