"""The loss from logits, for models and subclasses that the fused head does not support."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# As in the Rust core (src/head/odds_ratio.rs): a probability of one has infinite odds, and its slope is
# not resolved in single precision.
_SMALLEST = 1.401298464324817e-45
_STEEPEST = 16777216.0
_LN2 = 0.6931471805599453


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0, accurate near 0 and far from it (Maechler 2012). Not for
    autograd.
    """
    return torch.where(x < -_LN2, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


class _LogOdds(torch.autograd.Function):
    """Analytic gradient: autograd's is NaN for a log-probability of 0, infinity times 0."""

    @staticmethod
    def forward(ctx, chosen: Tensor, rejected: Tensor) -> Tensor:
        chosen, rejected = (x.clamp(max=-_SMALLEST) for x in (chosen, rejected))
        ctx.save_for_backward(chosen, rejected)
        return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        # d log_odds / d x = 1 / (1 - exp(x))
        chosen, rejected = (
            (gradient / -torch.expm1(x)).clamp(-_STEEPEST, _STEEPEST) for x in ctx.saved_tensors
        )
        return chosen, -rejected


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """
    Log odds ratio of mean log-probabilities, Hong et al. 2024 (arXiv 2403.07691), equation 4.

    Finite in value and gradient for arguments down to -1e4, and exactly 0. Evaluated in `float64`
    if the device has it: the differences below lose digits in single precision.

    Args:
        chosen (`Tensor`): `(B,)`, at most 0.
        rejected (`Tensor`): `(B,)`, at most 0.
    """
    dtype = torch.float32 if chosen.device.type == "mps" else torch.float64
    return _LogOdds.apply(chosen.to(dtype), rejected.to(dtype))


def pad_to(tensor: Tensor, length: int, value: int) -> Tensor:
    """Pad `tensor` (B, T) with `value` on the right up to `length`."""
    return F.pad(tensor, (0, length - tensor.shape[1]), value=value)


def concatenate(
    batch: dict[str, Any],
    is_encoder_decoder: bool,
    padding_value: int,
    device: torch.device | None,
) -> dict[str, Tensor]:
    """Concatenate the pairs of a batch: chosen sequences first, then rejected. See the trainer."""
    ids = "labels" if is_encoder_decoder else "input_ids"
    length = max(batch[f"chosen_{ids}"].shape[1], batch[f"rejected_{ids}"].shape[1])
    both = {}
    for key, chosen in batch.items():
        if not key.startswith("chosen_") or not torch.is_tensor(chosen):
            continue
        name = key.removeprefix("chosen_")
        if not torch.is_tensor(batch.get(f"rejected_{name}")):
            continue  # a column of the dataset that has such a name
        if is_encoder_decoder or name.endswith("labels"):
            value = -100
        else:
            value = 0 if name.endswith(("attention_mask", "token_type_ids")) else padding_value
        sides = (chosen, batch[f"rejected_{name}"])
        both[f"concatenated_{name}"] = torch.cat([pad_to(x, length, value) for x in sides])
    if is_encoder_decoder:
        for name in ("input_ids", "attention_mask"):
            both[f"concatenated_{name}"] = batch[f"prompt_{name}"].repeat(2, 1)
    return {key: value.to(device) for key, value in both.items()}


def shift_right(labels: Tensor, start: int | None, pad: int | None) -> Tensor:
    """Decoder inputs of an encoder-decoder model: labels shifted right, after a start token."""
    if start is None or pad is None:
        name = "decoder_start_token_id" if start is None else "pad_token_id"
        raise ValueError(f"model.config.{name} is None; must be a token id")
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted < 0, pad)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in `float32`, or as it is in `float64`."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sequence_logps(logits: Tensor, labels: Tensor, average: bool) -> Tensor:
    """
    Log-probability of each sequence's labels, without those below 0; 0 if there are none.

    Args:
        logits (`Tensor`): `(B, T, V)`, aligned with the labels.
        labels (`Tensor`): `(B, T)`.
        average (`bool`): Per token instead of in total.
    """
    counted = labels >= 0
    picked = wide(logits.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0])
    logps = picked - torch.logsumexp(wide(logits), dim=-1)
    total = torch.where(counted, logps, 0.0).sum(-1)
    return total / counted.sum(-1).clamp(min=1) if average else total


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood per token, without labels below 0; 0 if there are none."""
    flat = torch.where(labels < 0, -100, labels).flatten()
    total = F.cross_entropy(wide(logits.flatten(0, 1)), flat, ignore_index=-100, reduction="sum")
    return total / (flat != -100).sum().clamp(min=1)
