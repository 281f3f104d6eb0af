"""The loss from logits: TRL's formulas, finite at the edges.

The path of encoder-decoder models, of subclasses that override its pieces, and of models whose head
the fused path does not know.
"""

import math

import torch
import torch.nn.functional as F


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """`log(1 - exp(x))` for `x <= 0`, with a finite gradient at and near 0.

    Each branch gets arguments at which it is finite: the gradient of the branch that is not taken
    is multiplied by zero, and zero times infinity would be NaN.
    """
    smallest = torch.finfo(x.dtype).smallest_normal
    far, near = x.clamp(max=-math.log(2.0)), x.clamp(min=-math.log(2.0), max=-smallest)
    return torch.where(x < -math.log(2.0), torch.log1p(-far.exp()), (-torch.expm1(near)).log())


def log_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Log odds ratio from mean log-probabilities: Hong et al. 2024, equations 4 and 7."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def label_logps(
    logits: torch.Tensor, labels: torch.Tensor, average: bool, shifted: bool
) -> torch.Tensor:
    """
    Log-probability of each sequence's labels.

    Args:
        logits (`Tensor`): `(B, T, V)`.
        labels (`Tensor`): `(B, T)`, -100 where there is nothing to score.
        average (`bool`): Per label, instead of the sum. A sequence without labels has 0.
        shifted (`bool`): Logits at t are those of label t; else of label t + 1.

    Raises:
        ValueError: If the shapes do not agree.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; must be {tuple(logits.shape[:-1])}, that of "
            "logits without the vocabulary"
        )
    if not shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != -100
    logps = -F.cross_entropy(
        logits.float().transpose(1, 2), labels.clamp(min=0), reduction="none"
    )
    total = (logps * scored).sum(-1)
    return total / scored.sum(-1).clamp(min=1) if average else total


def nll(logits: torch.Tensor, labels: torch.Tensor, shifted: bool) -> torch.Tensor:
    """Token mean of the negative log-likelihood; arguments as for [`label_logps`]."""
    if not shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    summed = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return summed / (labels != -100).sum().clamp(min=1)


def mean_logits(logits: torch.Tensor, predicts: torch.Tensor) -> torch.Tensor:
    """Mean over the vocabulary and the positions where `predicts` `(B, T)` is true."""
    per_row = logits.detach().float().mean(-1)
    return (per_row * predicts).sum() / predicts.sum().clamp(min=1)


def shift_right(labels: torch.Tensor, start: int | None, pad: int | None) -> torch.Tensor:
    """
    Decoder inputs of an encoder-decoder model: labels one step later.

    Raises:
        ValueError: If the model's configuration lacks `decoder_start_token_id` or `pad_token_id`.
    """
    for name, value in (("decoder_start_token_id", start), ("pad_token_id", pad)):
        if value is None:
            raise ValueError(f"model.config.{name} is None; set it, usually to the pad token's id")
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad)
