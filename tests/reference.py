"""Naive versions of all ops in a few lines, for comparison with the fast ones."""

import torch
import torch.nn.functional as F


def logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    z = F.linear(hidden, weight, bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_logps(hidden, weight, targets, bias=None, softcap=None, logit_scale=1.0):
    logps = logits(hidden, weight, bias, softcap, logit_scale).log_softmax(-1)
    picked = logps.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == -100, torch.zeros_like(picked), picked)


def log1mexp(x):
    # Each branch gets arguments for which it is finite, so that no gradient is NaN.
    ln2 = 0.6931471805599453
    far, near = x.clamp(max=-ln2), x.clamp(min=-ln2, max=-1e-45)
    return torch.where(x < -ln2, torch.log1p(-torch.exp(far)), torch.log(-torch.expm1(near)))


def log_odds(chosen, rejected):
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def linear_orpo(
    hidden,
    weight,
    targets,
    sequence,
    completion,
    beta,
    bias=None,
    softcap=None,
    logit_scale=1.0,
    nll_scope="full",
    odds_ratio_link="logsigmoid",
):
    """The loss and a dict of the reported metrics."""
    logps = linear_logps(hidden, weight, targets, bias, softcap, logit_scale)
    pairs = int(sequence.max()) // 2 + 1
    scored, chosen = targets != -100, sequence < pairs
    in_nll = scored & chosen & (completion if nll_scope == "completion" else True)
    nll = -logps[in_nll].mean()
    answer = scored & completion
    means = torch.stack([logps[answer & (sequence == s)].mean() for s in range(2 * pairs)])
    c, r = means[:pairs], means[pairs:]
    whole = ~(c.isnan() | r.isnan())
    ratio = torch.where(whole, log_odds(c, r), torch.zeros_like(c))
    value = F.logsigmoid(ratio) if odds_ratio_link == "logsigmoid" else ratio
    loss = nll - beta * (value * whole).sum() / pairs
    z = logits(hidden, weight, bias, softcap, logit_scale)
    return loss, {
        "nll_loss": nll,
        "chosen_logps": c.nan_to_num(),
        "rejected_logps": r.nan_to_num(),
        "log_odds_chosen": ratio,
        "log_odds_ratio": F.logsigmoid(ratio) * whole,
        "chosen_logits": z[chosen].mean(),
        "rejected_logits": z[~chosen].mean(),
        "empty_completions": (~whole).sum(),
    }


def quantize_nf4(tensor, code, blocksize):
    """Packed bytes and scales, block by block."""
    midpoints = (code[1:] + code[:-1]) / 2
    codes, scales = [], []
    for block in tensor.detach().float().flatten().split(blocksize):
        whole = len(block) == blocksize
        largest = block.abs().max()
        scale = largest.clamp(min=1e-38)
        scales.append(largest if whole else scale)
        scaled = block * (1 / scale) if whole else block / scale
        codes.append((scaled[:, None] > midpoints).sum(1))
    flat = torch.cat(codes).to(torch.uint8)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_tensor([7])])
    return (flat[0::2] << 4 | flat[1::2])[:, None], torch.stack(scales)


def dequantize_nf4(packed, absmax, code, blocksize, shape, dtype=torch.float32):
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()
    codes = codes[: shape.numel()].long()
    scales = absmax.repeat_interleave(blocksize)[: len(codes)]
    return (code[codes] * scales).to(dtype).view(shape)


def quantize_blockwise(tensor, values, blocksize):
    """The nearest of `values`; the lower one on a tie."""
    codes, scales = [], []
    for block in tensor.flatten().split(blocksize):
        scale = block.abs().max()
        scales.append(scale)
        scaled = block / scale if scale > 0 else block
        distance = (scaled.double()[:, None] - values.double()).abs()
        codes.append(distance.argmin(1))
    return torch.cat(codes).to(torch.uint8).view(tensor.shape), torch.stack(scales)


def restored_scales(state):
    """The scale of each block in `float32`, from codes if they are quantised."""
    if state.state2 is None:
        return state.absmax
    nested = state.state2
    spread = nested.absmax.repeat_interleave(nested.blocksize)[: len(state.absmax)]
    return nested.code[state.absmax.long()] * spread + state.offset


def unpacked(packed, state):
    """A 4-bit weight in `float32`, from its codes and scales."""
    scales = restored_scales(state)
    return dequantize_nf4(packed, scales, state.code, state.blocksize, state.shape)


def galore_project(grad, left, right):
    grad = grad if left is None else left.to(grad).T @ grad
    return grad if right is None else grad @ right.to(grad).T


def galore_project_back(low, left, right):
    low = low if left is None else left.to(low) @ low
    return low if right is None else low @ right.to(low)


class GaLoreAdamW:
    """One matrix, exact SVD (Zhao et al. 2024, algorithm 2), in the dtype of the weight."""

    def __init__(self, weight, rank, gap, scale, proj_type):
        self.weight, self.rank, self.gap, self.scale = weight.clone(), rank, gap, scale
        tall = weight.shape[0] >= weight.shape[1]
        self.right = {"std": tall, "reverse_std": not tall, "left": False}.get(proj_type, True)
        self.left = proj_type == "full" or not self.right
        self.t, self.m, self.v, self.due = 0, 0.0, 0.0, 0

    def step(self, grad, lr, betas, eps, decay):
        if self.t >= self.due and grad.any():  # else there is nothing to make a basis of
            self.due = self.t + self.gap
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            self.bases = (
                u[:, : self.rank] if self.left else None,
                vh[: self.rank] if self.right else None,
            )
        if self.due == 0:
            return
        self.t += 1
        low = galore_project(grad, *self.bases)
        self.m = betas[0] * self.m + (1 - betas[0]) * low
        self.v = betas[1] * self.v + (1 - betas[1]) * low**2
        correction = (1 - betas[1] ** self.t) ** 0.5 / (1 - betas[0] ** self.t)
        change = galore_project_back(self.m / (self.v**0.5 + eps), *self.bases)
        self.weight -= lr * correction * self.scale * change
        self.weight *= 1 - lr * decay


class GaLoreStack:
    """Experts `(count, rows, columns)`: each is a matrix of its own."""

    def __init__(self, weight, *options):
        self.experts = [GaLoreAdamW(each, *options) for each in weight]

    def step(self, grad, **options):
        for expert, each in zip(self.experts, grad):
            expert.step(each, **options)

    @property
    def weight(self):
        return torch.stack([each.weight for each in self.experts])


class Apollo:
    """One matrix (Zhu et al. 2024, algorithm 1); `limited` is whether the limiter was active."""

    def __init__(self, weight, scale_type, scale):
        self.weight, self.scale_type, self.scale = weight.clone(), scale_type, scale
        self.t, self.m, self.v, self.last, self.limited = 0, 0.0, 0.0, None, False

    def step(self, grad, basis, lr, betas, eps, decay):
        right = grad.shape[0] >= grad.shape[1]
        low = grad @ basis.T if right else basis.T @ grad
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * low
        self.v = betas[1] * self.v + (1 - betas[1]) * low**2
        normed = self.m / (self.v**0.5 + eps)
        if self.scale_type == "channel":
            dim = 1 if right else 0
            factor = normed.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        else:
            factor = normed.norm() / (low.norm() + 1e-8)
        change = grad * factor
        if self.last is not None and change.norm() > 1.01 * self.last:
            change *= 1.01 * self.last / change.norm()
            self.limited = True
        self.last = change.norm()
        correction = (1 - betas[1] ** self.t) ** 0.5 / (1 - betas[0] ** self.t)
        self.weight -= lr * correction * self.scale**0.5 * change
        self.weight *= 1 - lr * decay


class AdamW:
    """A tensor in fp64 (Loshchilov and Hutter 2019, algorithm 2), the decay after the update."""

    def __init__(self, value):
        self.value, self.t, self.m, self.v = value.double(), 0, 0.0, 0.0

    def step(self, grad, lr, betas, eps, weight_decay):
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * grad.double()
        self.v = betas[1] * self.v + (1 - betas[1]) * grad.double() ** 2
        m, v = self.m / (1 - betas[0] ** self.t), self.v / (1 - betas[1] ** self.t)
        self.value = (self.value - lr * m / (v**0.5 + eps)) * (1 - lr * weight_decay)
