"""Every family of operations beside the same in plain torch, on one device, on odd shapes.

The measure is three-way: the truth is computed in `float64`, and ours may be as far from it as a few
times what torch is in the dtype itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _core
from ..functional import dequantize_nf4, linear_logps, linear_nf4, linear_orpo, quantize_nf4
from ..optim.adamw.adamw_8bit import AdamW8bit
from ..optim.adamw.moments import encode
from ..optim.adamw.step import AdamUpdate, NonFinite, adamw_step, rule_of
from ..quant.nf4 import dynamic_map
from ..quant.state import QuantState, dtype_name, nf4_code
from .findings import Trial

__all__ = ["CASES", "NO_NUMBER", "Case", "Measure", "cases", "dtypes", "farthest", "outcome"]

NO_NUMBER = "the result has NaN, or the wrong shape"

# How much farther from the truth than torch ours may be: sums in another order.
_SLACK = 4.0
# Roundings of the largest value that are allowed where torch happens to be exact.
_ROUNDINGS = 4.0


@dataclass
class Measure:
    """Results of one family.

    Args:
        ours, peer, truth (`list[Tensor]`): Results of ours, of torch in the dtype, and in `float64`.
        slack (`float`): What ours may be off beyond it, as a share, where ours rounds and torch does not.
    """

    ours: list[Tensor]
    peer: list[Tensor]
    truth: list[Tensor]
    slack: float = 0.0

    def deviation(self) -> float:
        return farthest(self.ours, self.truth)

    def allowed(self, dtype: torch.dtype) -> float:
        rounding = _ROUNDINGS * torch.finfo(dtype).eps
        return self.slack + _SLACK * farthest(self.peer, self.truth) + rounding


def farthest(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor; infinite for NaN."""
    worst = 0.0
    for result, true in zip(results, truth, strict=True):
        if result.shape != true.shape:
            return float("inf")
        size = true.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        share = ((result.double() - true).abs().max() / size).item()
        if share != share:
            return float("inf")
        worst = max(worst, share)
    return worst


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What is trained in on a device."""
    if device.type != "cuda" and not _core.emulates_cuda():
        return torch.float32, torch.bfloat16
    return torch.float32, torch.bfloat16, torch.float16


# Rows, width and tokens of a head: rows that end in the middle of everything; more than one tile of tokens;
# more than one block of rows.
_HEAD = (67, 136, 1001)
_TILES = (5, 24, 8301)
_BLOCKS = (2801, 8, 42)


def _head_inputs(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int] = _HEAD
) -> tuple[Tensor, Tensor, Tensor]:
    """With a weight that makes the softmax peaked."""
    draw = torch.Generator().manual_seed(0)
    rows, width, words = sizes
    weight = torch.randn(words, width, generator=draw) / width**0.5
    targets = torch.randint(words, (rows,), generator=draw)
    hidden = torch.randn(rows, width, generator=draw) + 0.5 * weight[targets] * width**0.5
    targets[::7] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def _naive_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    scored = targets >= 0
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    picked = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return picked * scored


def head_forward(device: torch.device, dtype: torch.dtype) -> Measure:
    """Log-probabilities of a frozen head."""
    inputs = _head_inputs(device, dtype)
    hidden, weight, targets = inputs
    return Measure(
        [linear_logps(*inputs)],
        [_naive_logps(*inputs)],
        [_naive_logps(hidden.double(), weight.double(), targets)],
    )


def head_expectation(device: torch.device, dtype: torch.dtype) -> Measure:
    """Gradients of the hidden states of a frozen head, in one tile and in several."""

    def gradients(logps: Callable[..., Tensor], wider: torch.dtype) -> list[Tensor]:
        found = []
        for sizes in (_HEAD, _TILES):
            hidden, weight, targets = _head_inputs(device, dtype, sizes)
            leaf = hidden.to(wider).requires_grad_()
            result = logps(leaf, weight.to(wider), targets)
            upstream = torch.linspace(-1, 1, len(targets), device=device, dtype=result.dtype)
            found += [result.detach(), *torch.autograd.grad(result, leaf, upstream)]
        return found

    return Measure(
        gradients(linear_logps, dtype),
        gradients(_naive_logps, dtype),
        gradients(_naive_logps, torch.float64),
    )


def head_gradient(device: torch.device, dtype: torch.dtype) -> Measure:
    """Gradients of hidden states and weight."""
    *inputs, targets = _head_inputs(device, dtype)
    upstream = torch.linspace(-1, 1, len(targets), device=device)

    def gradients(logps: Callable[..., Tensor], wider: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wider).requires_grad_() for x in inputs]
        result = logps(*leaves, targets)
        return list(torch.autograd.grad(result, leaves, upstream.to(result.dtype)))

    return Measure(
        gradients(linear_logps, dtype),
        gradients(_naive_logps, dtype),
        gradients(_naive_logps, torch.float64),
    )


def head_batch(device: torch.device, dtype: torch.dtype) -> Measure:
    """The loss of a batch of pairs, and its gradients: frozen in one block and in several, and trained."""
    kinds = [(_HEAD, False), (_BLOCKS, False), (_HEAD, True)]
    found = [_batch(_head_inputs(device, dtype, sizes), trained) for sizes, trained in kinds]
    ours, peer, truth = ([tensor for kind in found for tensor in kind[i]] for i in range(3))
    return Measure(ours, peer, truth)


def _batch(inputs: tuple[Tensor, Tensor, Tensor], trained: bool) -> tuple[list[Tensor], ...]:
    """Of one head: ours, torch's in the dtype, and the truth."""
    hidden, weight, targets = inputs
    device, dtype = hidden.device, hidden.dtype
    pairs, beta, factor = 3, 0.3, 0.7
    rows = torch.arange(len(targets), device=device)
    sequence = rows * 2 * pairs // len(targets)  # chosen ones, then rejected ones
    completion = (rows % 5 > 0) & (targets >= 0)

    def leaves(wider: torch.dtype) -> tuple[Tensor, Tensor]:
        copies = [x.to(wider, copy=True) for x in (hidden, weight)]
        return copies[0].requires_grad_(), copies[1].requires_grad_(trained)

    def results(loss: Tensor, metrics: list[Tensor], *inputs: Tensor) -> list[Tensor]:
        wanted = [x for x in inputs if x.requires_grad]
        # A mean of logits is near zero: what it may be off is a share of the largest of all.
        logged = torch.cat([x.detach().double().view(-1) for x in metrics])
        # The factor is that of accumulated steps, which the backward pass multiplies in.
        return [loss.detach(), logged, *torch.autograd.grad(factor * loss, wanted)]

    def naive(wider: torch.dtype) -> list[Tensor]:
        leaf, words = leaves(wider)
        logps = _naive_logps(leaf, words, targets).double()
        chosen = (sequence < pairs) & (targets >= 0)
        counts = torch.zeros(2 * pairs, device=device, dtype=torch.float64)
        counts.index_add_(0, sequence, completion.double())
        sums = torch.zeros_like(counts).index_add(0, sequence, logps * completion)
        means = sums / counts
        log_odds = means - torch.log(-torch.expm1(means))
        ratio = log_odds[:pairs] - log_odds[pairs:]
        log_sigmoid = F.logsigmoid(ratio)
        nll = -(logps * chosen).sum() / chosen.sum()
        loss = nll - beta * log_sigmoid.mean()
        logits = (leaf @ words.T).double().mean(1)
        sides = [logits[rows].mean() for rows in (sequence < pairs, sequence >= pairs)]
        return results(loss, [nll, means, ratio, log_sigmoid, *sides], leaf, words)

    leaf, words = leaves(dtype)
    given = linear_orpo(leaf, words, targets, sequence, completion, beta)
    # All but the loss and the number of empty completions.
    return results(given.loss, [*given[1:-1]], leaf, words), naive(dtype), naive(torch.float64)


# Values that end in the middle of a block and of a byte, and a weight whose rows end with one.
_VALUES = (61, 131)
_WEIGHT = (254, 384)


def _weight(device: torch.device, dtype: torch.dtype, shape: tuple[int, int] = _WEIGHT) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=draw).to(device, dtype)


def _blocks(values: Tensor, size: int) -> Tensor:
    """With zeros behind the last value."""
    flat = values.flatten()
    return F.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def nf4_quantize(device: torch.device, dtype: torch.dtype) -> Measure:
    """The codes: each value's distance to its code is the least there is."""
    weight = _weight(device, dtype, _VALUES)
    packed, state = quantize_nf4(weight)
    code, scales = nf4_code(device).double(), state.absmax.double()
    blocks = _blocks(weight.double(), 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = (scaled[..., None] - code).abs().amin(-1)
    # A largest value is exact in every dtype: ours may not be measured by itself.
    largest = blocks.abs().amax(1)
    return Measure(
        [(scaled - code[_codes(packed, weight.numel())]).abs(), scales],
        [nearest, largest],
        [nearest, largest],
    )


def nf4_dequantize(device: torch.device, dtype: torch.dtype) -> Measure:
    """The values of codes and scales."""
    weight = _weight(device, dtype, _VALUES)
    packed, state = quantize_nf4(weight)
    true = _values(packed, state, weight.shape)
    return Measure([dequantize_nf4(packed, state)], [true.to(dtype)], [true])


# The code of zero.
_ZERO = 7


def _codes(packed: Tensor, count: int) -> Tensor:
    """In blocks, with the code of zero behind the last one."""
    flat = torch.stack([packed >> 4, packed & 15], -1).flatten()[:count].long()
    return F.pad(flat, (0, -count % 64), value=_ZERO).view(-1, 64)


def _values(packed: Tensor, state: QuantState, shape: torch.Size) -> Tensor:
    code, count = nf4_code(packed.device).double(), shape.numel()
    values = code[_codes(packed, count)] * state.absmax.double()[:, None]
    return values.flatten()[:count].view(shape)


def nf4_product(device: torch.device, dtype: torch.dtype) -> Measure:
    """Products of one, a few and many tokens with a 4-bit weight, and their gradient."""
    weight = _weight(device, dtype)
    packed, state = quantize_nf4(weight)
    true = _values(packed, state, weight.shape)
    draw = torch.Generator().manual_seed(2)
    tokens = [torch.randn(n, 384, generator=draw).to(device, dtype) for n in (1, 3, 7, 67)]

    def results(product: Callable[[Tensor], Tensor], wider: torch.dtype) -> list[Tensor]:
        found = []
        for x in tokens:
            leaf = x.to(wider).requires_grad_()
            out = product(leaf)
            found += [out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))]
        return found

    def ours(x: Tensor) -> Tensor:
        return linear_nf4(x, packed, state)

    return Measure(
        results(ours, dtype),
        results(lambda x: x @ true.to(dtype).T, dtype),
        results(lambda x: x @ true.T, torch.float64),
    )


def blockwise8(device: torch.device, dtype: torch.dtype) -> Measure:
    """8-bit blocks, there and back."""
    values = _weight(device, dtype, _VALUES)
    code = dynamic_map().to(device)

    codes, absmax = _core.quantize_blockwise(values, code, 256)
    ours = _core.dequantize_blockwise(codes, absmax, code, 256, dtype_name(dtype))
    blocks = _blocks(values.double(), 256)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = code.double()[
        (blocks[..., None] / scales[..., None] - code.double()).abs().argmin(-1)
    ]
    back = (nearest * scales).flatten()[: values.numel()].view(values.shape)
    return Measure([ours], [back.to(dtype)], [back])


def adamw(device: torch.device, dtype: torch.dtype, bits: int) -> Measure:
    """Two steps of AdamW on tensors of one launch; 8-bit moments differ from the second step on."""
    start, *wide = _updates(device)
    start, gradients = start.to(dtype), [x.to(dtype) for x in wide]
    # Not the usual eps, with which 8-bit moments of small gradients would count as much as those of large ones.
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}
    # Of every tensor, so that a launch has more than one rule.
    decays = [0.5, 0.0, 0.5]

    def parts(whole: Tensor) -> list[Tensor]:
        return [part.clone() for part in whole.split(_TENSORS)]

    def groups(wider: torch.dtype, decays: list[float]) -> list[dict[str, Any]]:
        made = [torch.nn.Parameter(part) for part in parts(start.to(wider))]
        return [{"params": [x], "weight_decay": decay} for x, decay in zip(made, decays)]

    def run(
        optimizer: torch.optim.Optimizer, after: list[float], given: list[Tensor]
    ) -> list[Tensor]:
        parameters = [group["params"][0] for group in optimizer.param_groups]
        for gradient in given:
            for parameter, part in zip(parameters, parts(gradient)):
                parameter.grad = part.to(parameter.dtype)
            optimizer.step()
            for parameter, factor in zip(parameters, after):
                parameter.detach().mul_(factor)
        return [torch.cat([parameter.detach() for parameter in parameters])]

    def naive(wider: torch.dtype, given: list[Tensor]) -> list[Tensor]:
        # As bitsandbytes, ours decays after the step, and torch before it.
        plain = torch.optim.AdamW(groups(wider, [0.0] * len(decays)), **options)
        return run(plain, [1 - 0.1 * decay for decay in decays], given)

    def with_wide_gradients() -> list[Tensor]:
        values = parts(start)
        states = [_moments(value, bits) for value in values]
        # Of stochastic rounding, of one of a launch's tensors; bfloat16 alone has it.
        seeds = [12345, None, None]
        for step, gradient in enumerate(wide, 1):
            rules = [rule_of({**options, "weight_decay": decay}, step) for decay in decays]
            updates = zip(values, parts(gradient), states, rules, seeds, strict=True)
            adamw_step([AdamUpdate(*update) for update in updates], NonFinite())
        return [torch.cat(values)]

    mine = AdamW8bit(groups(dtype, decays), **options, optim_bits=bits, min_8bit_size=1)
    # A step of 0.1 in values up to 1, with moments of about two digits.
    slack = 0.02 if bits == 8 else 0.0
    return Measure(
        [*run(mine, [1.0] * len(decays), gradients), *with_wide_gradients()],
        # Not in the dtype, in which torch would keep the moments too.
        [x.to(dtype) for given in (gradients, wide) for x in naive(torch.float32, given)],
        [*naive(torch.float64, gradients), *naive(torch.float64, wide)],
        slack,
    )


# Tensors that end in the middle of a block of moments, the first after a block of threads.
_TENSORS = [2051, 1, 2047]


def _updates(device: torch.device) -> Iterator[Tensor]:
    """Values and two gradients."""
    draw = torch.Generator().manual_seed(3)
    # Small values: a step that is missing is more than a rounding of them.
    return (
        (size * torch.randn(sum(_TENSORS), generator=draw)).to(device) for size in (0.25, 1.0, 1.0)
    )


def _moments(parameter: Tensor, bits: int) -> dict[str, Any]:
    """The state before the first step."""
    first, second = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
    return encode(first, second) if bits == 8 else {"state1": first, "state2": second}


@dataclass(frozen=True)
class Case:
    """
    Operations that are right or wrong together.

    Args:
        name (`str`): For a person.
        family (`str`): The kernels that are tried, as the core names them.
        run (`Callable`): Computes them on a device in a dtype.
    """

    name: str
    family: str
    run: Callable[[torch.device, torch.dtype], Measure]


CASES = (
    Case("head, forward", "head_forward", head_forward),
    Case("head, frozen", "head_expectation", head_expectation),
    Case("head, gradients", "head_gradient", head_gradient),
    Case("head, loss of a batch", "head_batch", head_batch),
    Case("NF4, quantise", "nf4_quantize", nf4_quantize),
    Case("NF4, dequantise", "nf4_dequantize", nf4_dequantize),
    Case("NF4, products", "nf4_product", nf4_product),
    Case("8-bit blocks", "blockwise8", blockwise8),
    Case("AdamW, 8 bits", "adamw8", lambda device, dtype: adamw(device, dtype, 8)),
    Case("AdamW, 32 bits", "adamw32", lambda device, dtype: adamw(device, dtype, 32)),
)


def cases(device: torch.device) -> Iterator[tuple[Case, torch.dtype]]:
    """Every family with every dtype that it serves on a device."""
    for case in CASES:
        for dtype in dtypes(device):
            yield case, dtype


def outcome(case: Case, device: torch.device, dtype: torch.dtype) -> Trial:
    """What a family gives; an error of any kind is a result too."""
    named = str(device), case.name, str(dtype).removeprefix("torch.")
    try:
        measure = case.run(device, dtype)
        deviation = measure.deviation()
        if deviation == float("inf"):
            return Trial(*named, None, None, NO_NUMBER)
        return Trial(*named, deviation, measure.allowed(dtype))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Trial(*named, None, None, reason)
