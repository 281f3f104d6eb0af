"""A few calls of the compiled core beside the same in torch, for a torch that nobody has tested."""

from collections.abc import Callable

import torch


def _head() -> bool:
    from .functional import linear_logps

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, generator=generator, requires_grad=True)
    weight = torch.randn(40, 16, generator=generator, requires_grad=True)
    targets = torch.tensor([3, 39, -100, 0, 7])
    mine = linear_logps(hidden, weight, targets)
    scored = targets >= 0
    logits = torch.log_softmax(hidden @ weight.T, -1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    theirs = torch.where(scored, picked, torch.zeros(()))
    upstream = torch.randn(5, generator=generator)
    gradients = [torch.autograd.grad(x, [hidden, weight], upstream) for x in (mine, theirs)]
    pairs = [(mine, theirs), *zip(*gradients, strict=True)]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def _nf4() -> bool:
    from .functional import dequantize_nf4, quantize_nf4

    values = torch.linspace(-1, 1, 129).view(3, 43)
    packed, state = quantize_nf4(values)
    back = dequantize_nf4(packed, state)
    return back.shape == values.shape and bool((back - values).abs().max() < 0.16)


def _error() -> bool:
    from .functional import linear_logps

    try:
        linear_logps(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, dtype=torch.int64))
    except ValueError:
        return True
    return False


CHECKS: dict[str, Callable[[], bool]] = {
    "log-probabilities and gradients": _head,
    "4-bit weights": _nf4,
    "errors": _error,
}


def run() -> str | None:
    """Tries the core.

    Returns:
        What fails, or none.
    """
    for name, check in CHECKS.items():
        try:
            if not check():
                return f"{name} differ"
        except Exception as error:
            return f"{name}: {error}"
    return None
