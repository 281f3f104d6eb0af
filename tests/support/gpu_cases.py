"""Inputs that the tests of this folder share."""

import torch

import reference
from oddsmith.quant.state import nf4_code

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape, dtype, seed: int = 5) -> torch.Tensor:
    """Values over four decades; a block of zeros, and one of ties and their neighbours. CPU."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(shape, generator=generator) * 4 - 3
    values = torch.randn(shape, generator=generator) * 10**size
    flat = values.view(-1)
    flat[64:128] = 0
    code = nf4_code(torch.device("cpu"))
    ties = (code[1:] + code[:-1]) / 2
    edges = torch.cat([torch.ones(1), code, ties, ties.nextafter(torch.tensor(2.0))])
    flat[128 : 128 + len(edges)] = edges[: max(len(flat) - 128, 0)]
    return values.to(dtype)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal bits on any devices, NaN for NaN."""
    ours, theirs = ours.cpu(), theirs.cpu()
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    nan = ours.isnan()
    return torch.equal(nan, theirs.isnan()) and torch.equal(ours[~nan], theirs[~nan])


def to(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def pairs(vocab: int, width: int, lengths, dtype, seed: int = 3):
    """Rows of chosen, then rejected sequences of (prompt, answer) tokens, peaked as a trained
    model's: hidden, weight, targets, sequence, completion."""
    generator = torch.Generator().manual_seed(seed)
    half = len(lengths) // 2
    targets, sequence, completion = [], [], []
    for index, (prompt, answer) in enumerate(lengths):
        words = torch.randint(vocab, (prompt + answer,), generator=generator)
        if index >= half:
            words[:prompt] = -100
        targets.append(words)
        sequence += [index] * (prompt + answer)
        completion += [False] * prompt + [True] * answer
    targets = torch.cat(targets)
    weight = torch.randn(vocab, width, generator=generator)
    hint = torch.nn.functional.normalize(weight[targets.clamp(min=0)], dim=-1)
    strength = 3 * torch.rand(len(targets), 1, generator=generator) * width**-0.5
    hidden = torch.randn(len(targets), width, generator=generator) * width**-0.5 + strength * hint
    rows = targets, torch.tensor(sequence), torch.tensor(completion)
    return hidden.to(dtype), weight.to(dtype), *rows


def loss_and_gradients(function, hidden, weight, rows, trained: bool, **options):
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(trained)
    loss = function(hidden, weight, *rows, 0.29, **options)[0]
    inputs = [hidden, weight] if trained else [hidden]
    return [x.detach().double().cpu() for x in (loss, *torch.autograd.grad(loss, inputs))]


def assert_no_further(ours, naive, truth, dtype, floor: float = 4.0) -> None:
    """|ours - truth| <= 2 |naive - truth| + a few roundings, in units of the largest true value.

    Twice, as the sums of both depend on the processor and on where its threads split them.
    """
    for mine, theirs, true in zip(ours, naive, truth, strict=True):
        scale = true.abs().max()
        error, naive_error = ((x - true).abs().max() / scale for x in (mine, theirs))
        allowed = 2 * naive_error + floor * torch.finfo(dtype).eps
        assert error <= allowed, f"{error:.2e} from the truth, the naive form {naive_error:.2e}"


def true_loss(hidden, weight, rows, trained: bool, **options):
    """In `float64`, on the CPU."""
    hidden, weight = hidden.cpu().double(), weight.cpu().double()
    rows = to("cpu", *rows)
    return loss_and_gradients(reference.linear_orpo, hidden, weight, rows, trained, **options)
