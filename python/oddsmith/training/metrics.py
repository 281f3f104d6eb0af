"""MetricStore: averages metrics of micro-batches on their device and reads them once per log."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

Split = Literal["train", "eval"]

# Keys that are not averages. The two private ones track the loss and are not logged.
EMPTY_COMPLETIONS = "empty_completions"
NON_FINITE, FIRST_NON_FINITE = "_non_finite", "_first_non_finite"
_SUMS = (EMPTY_COMPLETIONS, NON_FINITE)
_MINIMA = (FIRST_NON_FINITE,)


class MetricStore:
    """
    Metrics since the last log, by split (`"train"` and `"eval"`).

    Tensors stay on their device, and are only summed there. Python numbers are assumed to be equal
    in all processes, like those that TRL's trainer stores.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, list[torch.Tensor]]] = {}
        self._numbers: dict[str, dict[str, list[float]]] = {}

    def add(self, split: str, metrics: Mapping[str, Any], weight: float = 1.0) -> None:
        """
        Add the metrics of a micro-batch.

        Args:
            split (`str`): `"train"` or `"eval"`.
            metrics (`Mapping[str, Tensor or float]`): 0-dim tensors or numbers.
            weight (`float`, *optional*, defaults to 1.0): Weight of this micro-batch.
        """
        tensors = self._tensors.setdefault(split, {})
        numbers = self._numbers.setdefault(split, {})
        for key, value in metrics.items():
            if not torch.is_tensor(value):
                total = numbers.setdefault(key, [0.0, 0.0])
                total[0] += float(value) * weight
                total[1] += weight
                continue
            # MPS has no float64; the error over a few hundred terms is not visible in a log.
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            value = value.detach().to(dtype)
            if key in _MINIMA:
                state = tensors.setdefault(key, [value, torch.ones_like(value)])
                state[0] = torch.minimum(state[0], value)
            else:
                state = tensors.setdefault(key, [torch.zeros_like(value) for _ in range(2)])
                # A micro-batch with weight 0 may have no pairs, and so NaN metrics.
                state[0] = state[0] + (value * weight if weight else 0.0)
                state[1] = state[1] + weight

    def watch(self, split: str, loss: torch.Tensor, step: int) -> None:
        """Count a loss that is NaN or infinite, without waiting for the device."""
        bad = ~torch.isfinite(loss.detach())
        first = torch.where(bad, float(step), float("inf"))
        self.add(split, {NON_FINITE: bad.sum(), FIRST_NON_FINITE: first})

    def pop(self, split: str, accelerator: Any) -> dict[str, float]:
        """
        Averages over micro-batches and processes since the last call.

        All processes must call this. It reads once from the device.

        Args:
            split (`str`): `"train"` or `"eval"`.
            accelerator (`Accelerator`): Gathers over processes.
        """
        tensors = self._tensors.pop(split, {})
        numbers = self._numbers.pop(split, {})
        out = {key: total / weight for key, (total, weight) in numbers.items() if weight}
        if not tensors:
            return out
        device = accelerator.device
        flat = torch.stack([part.to(device) for state in tensors.values() for part in state])
        processes = accelerator.gather(flat).view(-1, len(tensors), 2).tolist()
        for position, key in enumerate(tensors):
            values, weights = zip(*(process[position] for process in processes), strict=True)
            if key in _MINIMA:
                out[key] = min(values)
            elif key.removeprefix("eval_") in _SUMS:
                out[key] = sum(values)
            elif sum(weights):
                out[key] = sum(values) / sum(weights)
        return out


def batch_share(accelerator: Any, pairs: int) -> tuple[int, float]:
    """
    Number of this process's pairs in an evaluation batch that are not repeats, and the batch's
    weight.

    The last batch is filled up with pairs from the beginning, so that all processes have one.

    Args:
        accelerator (`Accelerator`): Knows the state of the data loader.
        pairs (`int`): Pairs in this process's batch.

    Returns:
        `tuple[int, float]`: Count of leading pairs to average over, and the weight with which all
            global batches count equally.
    """
    state, processes = accelerator.gradient_state, accelerator.num_processes
    if processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return pairs, 1.0
    own = min(max(state.remainder - accelerator.process_index * pairs, 0), pairs)
    return own, processes * own / state.remainder


class PairScores(NamedTuple):
    """
    Scores of a batch of B pairs.

    Only `loss` and `aux_loss` carry gradients. `log_odds_ratio` and `log_odds_chosen` are `(B,)`,
    or means if a hook averaged them.
    """

    loss: torch.Tensor
    nll_loss: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    log_odds_ratio: torch.Tensor
    log_odds_chosen: torch.Tensor
    chosen_logits: torch.Tensor
    rejected_logits: torch.Tensor
    whole: torch.Tensor  # (B,) bool: neither completion is empty
    aux_loss: torch.Tensor | None


def pair_metrics(scores: PairScores, pairs: int) -> dict[str, torch.Tensor]:
    """
    TRL's metrics of a batch, the count of pairs with an empty completion and, of a mixture of
    experts that has it, the auxiliary loss.

    Args:
        scores ([`PairScores`]): The batch.
        pairs (`int`): Leading pairs to average over; pairs with an empty completion are excluded.
    """
    whole = scores.whole[:pairs]
    count = whole.sum().clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        if values.dim() == 0:
            return values
        return torch.where(whole, values[:pairs].float(), 0.0).sum() / count

    chosen, rejected = scores.chosen_rewards, scores.rejected_rewards
    metrics = {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean(chosen > rejected),
        "rewards/margins": mean(chosen - rejected),
        "logps/rejected": mean(scores.rejected_logps),
        "logps/chosen": mean(scores.chosen_logps),
        "logits/rejected": scores.rejected_logits,
        "logits/chosen": scores.chosen_logits,
        "nll_loss": scores.nll_loss,
        "log_odds_ratio": mean(scores.log_odds_ratio),
        "log_odds_chosen": mean(scores.log_odds_chosen),
        EMPTY_COMPLETIONS: (~whole).sum(),
    }
    if scores.aux_loss is not None:
        metrics["aux_loss"] = scores.aux_loss.detach()
    return metrics
