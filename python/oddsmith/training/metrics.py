"""MetricStore: averages metrics of micro-batches on their device and reads them once per log."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

Split = Literal["train", "eval"]

# Keys that are not averages. The private ones track the loss and are not logged.
EMPTY_COMPLETIONS = "empty_completions"
NON_FINITE, FIRST_NON_FINITE = "_non_finite", "_first_non_finite"
# Pairs of an evaluation, and the two parts of its loss: means over tokens and over pairs.
PAIRS, TOKEN_LOSS, PAIR_LOSS = "_pairs", "_token_loss", "_pair_loss"
_SUMS = (EMPTY_COMPLETIONS, NON_FINITE, PAIRS)
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

    def add(
        self,
        split: str,
        metrics: Mapping[str, Any],
        weight: float = 1.0,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Add the metrics of a micro-batch.

        Args:
            split (`str`): `"train"` or `"eval"`.
            metrics (`Mapping[str, Tensor or float]`): 0-dim tensors or numbers.
            weight (`float`, *optional*, defaults to 1.0): Weight of this micro-batch.
            weights (`Mapping[str, Tensor]`, *optional*):
                Weights of single metrics, 0-dim, instead of `weight`.
        """
        tensors = self._tensors.setdefault(split, {})
        numbers = self._numbers.setdefault(split, {})
        for key, value in metrics.items():
            if not torch.is_tensor(value):
                total = numbers.setdefault(key, [0.0, 0.0])
                total[0] += float(value) * weight if weight else 0.0
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
                own = (weights or {}).get(key, weight)
                own = torch.as_tensor(own, dtype=dtype, device=value.device)
                # A micro-batch with weight 0 may have no pairs, and so NaN metrics.
                state[0] = state[0] + torch.where(own > 0, value * own, 0.0)
                state[1] = state[1] + own

    def state(self) -> Any:
        """A copy, for [`set_state`]."""
        # Sums are replaced, not changed.
        return [
            {
                split: {key: list(value) for key, value in each.items()}
                for split, each in part.items()
            }
            for part in (self._tensors, self._numbers)
        ]

    def set_state(self, state: Any) -> None:
        """Goes back to a state."""
        self._tensors, self._numbers = state

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


def batch_share(accelerator: Any, pairs: int) -> int:
    """
    Number of leading pairs of this process's evaluation batch that are not repeats.

    A data loader of accelerate's fills its last batch up with pairs from the beginning, so that all
    processes have one. Those of the trainer do not.

    Args:
        accelerator (`Accelerator`): Knows the state of the data loader.
        pairs (`int`): Pairs in this process's batch.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return pairs
    return min(max(state.remainder - accelerator.process_index * pairs, 0), pairs)


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
    # What the means over tokens are over: targets of the likelihood, rows of the two sides.
    nll_tokens: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


@dataclass
class BatchWeights:
    """
    How much a batch counts in the averages of its split.

    Args:
        pairs (`float`, *optional*, defaults to 1.0): Weight of what has no other.
        others (`dict[str, Tensor]`, *optional*): Weights of single metrics, 0-dim.
    """

    pairs: float = 1.0
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def evaluation_weights(scores: PairScores, pairs: int, prefix: str) -> BatchWeights:
    """
    Weights with which the averages over batches are those of all pairs in one batch.

    Args:
        scores ([`PairScores`]): The batch.
        pairs (`int`): Its leading pairs that count; 0 if it only fills up a step.
        prefix (`str`): Prefix of the names.
    """
    tokens = {
        "nll_loss": scores.nll_tokens,
        "logits/chosen": scores.chosen_tokens,
        "logits/rejected": scores.rejected_tokens,
    }
    whole = scores.whole[:pairs].sum()
    means = dict.fromkeys(_MEANS_OVER_PAIRS, whole)
    if not pairs:
        tokens = {name: torch.zeros_like(count) for name, count in tokens.items()}
    others = {f"{prefix}{name}": count for name, count in {**means, **tokens}.items()}
    return BatchWeights(float(pairs), others)


# Metrics that leave pairs with an empty completion out.
_MEANS_OVER_PAIRS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/rejected",
    "logps/chosen",
    "log_odds_ratio",
    "log_odds_chosen",
)


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
