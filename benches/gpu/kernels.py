"""Kernels beside their peers, for `python -m benches.gpu`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .bench import Bench, importable
from .trainers import BETA, orpo_loss


@dataclass
class Peaks:
    """What the GPU reaches in this run: bytes per second of a copy, FLOP per second of a matrix product."""

    copy: float
    product: float


def measure_peaks(bench: Bench, size: int) -> Peaks:
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    source = torch.empty(size**2, device=bench.device, dtype=torch.float32).zero_()
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    for run in runs.values():
        run()
    seconds = bench.interleave(runs)
    copied, product = (statistics.median(seconds[name]) for name in ("copy", "product"))
    peaks = Peaks(2 * source.nbytes / copied, 2 * size**3 / product)
    key, case = "peak", "the GPU"
    name = f"copy of {source.nbytes / 1e6:.0f} MB"
    bench.report(key, case, name, seconds["copy"], gb_s=peaks.copy / 1e9)
    name = f"product of {size} cubed, {str(dtype).removeprefix('torch.')}"
    bench.report(key, case, name, seconds["product"], tflop_s=peaks.product / 1e12)
    return peaks


def compare(bench, peaks, key, case, runs, moved=None, flops=None) -> None:
    """Rows of a case: `moved` bytes and `flops` are what it cannot do without."""
    extra = {}
    for name, run in runs.items():
        with bench.survives(case, name):
            run()  # compiles, tunes
            extra[name] = bench.extra_memory(run)
    seconds = bench.interleave({name: runs[name] for name in extra})
    for name, values in seconds.items():
        median = statistics.median(values)
        bench.report(
            key,
            case,
            name,
            values,
            gb_s=moved and moved / median / 1e9,
            tflop_s=flops and flops / median / 1e12,
            of_peak=(moved / peaks.copy if moved else flops / peaks.product) / median,
            extra_gb=None if extra[name] is None else extra[name] / 1e9,
        )


def nf4_kernels(bench: Bench, peaks: Peaks, rows: int, columns: int, tokens: int) -> None:
    from oddsmith.functional import dequantize_nf4, linear_nf4, quantize_nf4

    dtype = torch.bfloat16 if bench.cuda else torch.float32
    weight = torch.randn(rows, columns, device=bench.device, dtype=dtype) * 0.02
    packed, state = quantize_nf4(weight)
    x = torch.randn(tokens, columns, device=bench.device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, rows, device=bench.device, dtype=dtype)
    token = x.detach()[:1]

    def train(multiply):
        return lambda: torch.autograd.grad(multiply(x), x, upstream)

    def ours(x):
        return linear_nf4(x, packed, state)

    quantise = {"oddsmith": lambda: quantize_nf4(weight)}
    dequantise = {"oddsmith": lambda: dequantize_nf4(packed, state)}
    decode = {"oddsmith": lambda: ours(token)}
    linear = {"oddsmith": train(ours), "weight in full": train(lambda x: F.linear(x, weight))}
    if importable("bitsandbytes"):
        import bitsandbytes as bnb

        peer = bnb.functional
        codes, other = peer.quantize_4bit(weight, quant_type="nf4")

        def theirs(x):
            return bnb.matmul_4bit(x, codes.t(), quant_state=other)

        quantise["bitsandbytes"] = lambda: peer.quantize_4bit(weight, quant_type="nf4")
        dequantise["bitsandbytes"] = lambda: peer.dequantize_4bit(codes, other)
        decode["bitsandbytes"] = lambda: theirs(token)
        linear["bitsandbytes"] = train(theirs)
    kind = str(dtype).removeprefix("torch.")
    size, row = f"{rows} x {columns}, {kind}", f"{rows}x{columns}_{kind}"
    codes_and_scales = packed.nbytes + state.absmax.nbytes
    moved = weight.nbytes + codes_and_scales
    compare(bench, peaks, f"nf4_quantize_{row}", f"NF4 quantise, {size}", quantise, moved)
    compare(bench, peaks, f"nf4_dequantize_{row}", f"NF4 dequantise, {size}", dequantise, moved)
    with torch.no_grad():
        case = f"NF4 times one token, {size}"
        compare(bench, peaks, f"nf4_linear_1_token_{row}", case, decode, codes_and_scales)
    case = f"NF4 linear, forward and backward, {tokens} tokens, {size}"
    key = f"nf4_linear_{tokens}_tokens_{row}"
    compare(bench, peaks, key, case, linear, flops=4 * tokens * weight.numel())


def head_kernels(bench, peaks, rows: int, width: int, vocab: int, trained: bool) -> None:
    """Loss and gradients of 8 sequences; a third of each is prompt."""
    from oddsmith.functional import linear_orpo

    dtype = torch.bfloat16 if bench.cuda else torch.float32
    count, device = 8, bench.device
    length = rows // count
    weight = torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5
    tokens = torch.randint(vocab, (count, length), device=device)
    # A trained model's hidden state points at the next token: peaked logits.
    hint = F.normalize(weight[tokens].float(), dim=-1)
    hidden = (
        (torch.randn(count, length, width, device=device) + 12 * hint).to(dtype).requires_grad_()
    )
    weight.requires_grad_(trained)
    answer = (torch.arange(length, device=device) >= length // 3).expand(count, length)
    labels = torch.where(answer, tokens, -100)
    chosen = (torch.arange(count, device=device) < count // 2)[:, None]
    targets = torch.where(chosen | answer, tokens, -100).flatten()
    sequence = torch.arange(count, device=device).repeat_interleave(length)
    inputs = [hidden, weight] if trained else [hidden]

    def ours():
        flat, completion = hidden.reshape(-1, width), answer.reshape(-1)
        out = linear_orpo(flat, weight, targets, sequence, completion, BETA, num_pairs=count // 2)
        return out.loss.detach(), *torch.autograd.grad(out.loss, inputs)

    runs = {"oddsmith": ours}
    if importable("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

        fused = LigerFusedLinearORPOLoss(beta=BETA, compiled=bench.cuda)

        def liger():
            loss = fused(weight, hidden, labels.clone(), nll_target=tokens.clone())[0]
            return loss.detach(), *torch.autograd.grad(loss, inputs)

        runs["Liger"] = liger
    if importable("trl"):
        from trl.kernels import ChunkedLogProbFunction

        def chunked():
            logps = ChunkedLogProbFunction.apply(
                hidden.reshape(-1, width), weight, None, tokens.flatten(), 1.0, 8192, None, 1.0, ()
            )[0]
            loss = orpo_loss(logps.view(count, length), tokens, labels)
            return loss.detach(), *torch.autograd.grad(loss, inputs)

        runs["TRL, chunked"] = chunked
    if importable("cut_cross_entropy") and bench.cuda:
        from cut_cross_entropy import linear_cross_entropy

        def cut():
            logps = -linear_cross_entropy(hidden, weight, tokens, reduction="none")
            loss = orpo_loss(logps, tokens, labels)
            return loss.detach(), *torch.autograd.grad(loss, inputs)

        runs["CCE"] = cut
    scored = int((targets != -100).sum())
    state = "trained" if trained else "frozen"
    case = f"head, {state}, {rows} x {width} x {vocab}"
    truth = ours()[0].item()
    for name, run in list(runs.items())[1:]:
        with bench.survives(case, name):
            loss = run()[0].item()
            if not abs(loss - truth) < 0.02 * abs(truth):
                print(f"  {name}: its loss is {loss:.4f}, ours {truth:.4f}")
    flops = (3 if trained else 2) * 2 * scored * vocab * width
    compare(bench, peaks, f"head_{rows}x{width}x{vocab}_{state}", case, runs, flops=flops)


def optimizer_kernels(bench: Bench, peaks: Peaks, count: int) -> None:
    """
    Steps of `count` values in `float32`, in parameters of a million: bytes of weight, gradient and state,
    read and written. Paged ones may have a quarter of their state on the device; alone, without a
    backward pass to copy beside, a step waits for the bus.
    """
    import oddsmith.optim as ours

    peer = None
    if importable("bitsandbytes"):
        import bitsandbytes.optim as peer
    quarter = {"device_budget": max(count // 2, 1 << 20)}
    makers = {
        ("AdamW, moments of 8 bits", 16): [
            ("oddsmith", ours, "AdamW8bit", {}),
            ("oddsmith, paged", ours, "PagedAdamW8bit", quarter),
            ("bitsandbytes", peer, "AdamW8bit", {}),
            ("bitsandbytes, paged", peer if bench.cuda else None, "PagedAdamW8bit", {}),
        ],
        ("AdamW, moments of 32 bits", 28): [
            ("oddsmith, paged", ours, "PagedAdamW32bit", {"device_budget": 2 * count}),
            ("torch, fused", torch.optim, "AdamW", {"fused": True}),
            ("bitsandbytes, paged", peer if bench.cuda else None, "PagedAdamW32bit", {}),
        ],
    }
    each = min(count, 1 << 20)
    for (case, moved), several in makers.items():
        runs = {}
        for name, module, kind, options in several:
            if not hasattr(module, kind):
                continue
            with bench.survives(case, name):
                parameters = []
                for _ in range(count // each):
                    parameters.append(torch.nn.Parameter(torch.randn(each, device=bench.device)))
                    parameters[-1].grad = torch.randn_like(parameters[-1])
                kind = getattr(module, kind)
                runs[name] = kind(parameters, lr=1e-5, weight_decay=0.01, **options).step
        bits = "8bit" if "8 bits" in case else "32bit"
        key = f"adamw{bits}_{count / 1e6:.1f}m"
        compare(bench, peaks, key, f"{case}, {count / 1e6:.1f} M values", runs, moved * count)


def kernels(bench: Bench, tiny: bool) -> None:
    peaks = measure_peaks(bench, 512 if tiny else 8192)
    shapes = [(128, 256)] if tiny else [(4096, 4096), (4096, 14_336), (14_336, 4096)]
    for rows, columns in shapes:
        if not bench.out_of_time:
            nf4_kernels(bench, peaks, rows, columns, 32 if tiny else 2048)
    # The last is the one that cut-cross-entropy and Liger publish times of.
    large = [(8192, 4096, 32_000), (8192, 4096, 128_256), (16_384, 2048, 248_320)]
    heads = [(96, 64, 512)] if tiny else large
    for sizes in heads:
        for trained in (False, True):
            if not bench.out_of_time:
                head_kernels(bench, peaks, *sizes, trained)
    optimizer_kernels(bench, peaks, 1 << (16 if tiny else 27))
