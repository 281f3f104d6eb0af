"""The fused head inside a model's own forward pass.

The loss is computed where the model would make its logits: in the output head, which the model
calls, which its wrappers call. No wrapper is bypassed, so DDP, FSDP, ZeRO-3, PEFT and autocast see
the expected calls.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..bf16_products import bf16_products
from ..head.ops import LinearORPOOutput, linear_orpo
from ..packing.batch import PackedBatch
from .head_probe import HeadMismatch, LogitMap, find_head, head_bias, head_weight, probe_head
from .model_core import core_of
from .module_forward import ModuleForward

__all__ = ["FusedBatch", "FusedOutput", "HeadMismatch", "check", "fused_loss"]


@dataclass(frozen=True)
class FusedBatch:
    """
    What the head needs to know about a batch: the rows that predict, and the objective.

    Args:
        rows (`Tensor`): Positions in the flattened batch that the model runs on, `(N,)`.
        targets (`Tensor`): Token that each row predicts, or -100, `(N,)`.
        sequence (`Tensor`): Sequence of each row, `(N,)`.
        completion (`Tensor`): Whether the target is a completion token, `(N,)`.
        positions (`int`): Positions of that batch.
        num_pairs (`int`): `B`.
        num_scored (`int`, *optional*): Rows in the loss, if known on the host.
        beta (`float`): Weight of the odds ratio term.
        nll_scope (`str`): See [`~oddsmith.functional.linear_orpo`], as the next two.
        odds_ratio_link (`str`): See there.
        logits_budget (`int`, *optional*): See there.
    """

    rows: Tensor
    targets: Tensor
    sequence: Tensor
    completion: Tensor
    positions: int
    num_pairs: int
    num_scored: int | None
    beta: float
    nll_scope: str
    odds_ratio_link: str
    logits_budget: int | None

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        unscored: Tensor | None = None,
        **objective: Any,
    ) -> "FusedBatch":
        """
        From a padded batch, each tensor `(2B, T)`, chosen sequences first.

        Every position whose successor is not padding is a row. Tokens where `unscored` is True are
        no targets of the likelihood term.
        """
        real = attention_mask != 0
        predicts = torch.zeros_like(real)
        predicts[:, :-1] = real[:, :-1] & real[:, 1:]
        completion = torch.zeros_like(real)
        completion[:, :-1] = labels[:, 1:] >= 0
        sequence = torch.arange(real.shape[0], device=real.device)[:, None].expand_as(real)
        rows = predicts.flatten().nonzero()[:, 0]
        columns = (input_ids.roll(-1, dims=1), sequence, completion)
        successors, sequence, completion = (column.flatten()[rows] for column in columns)
        if unscored is not None:  # negative targets are in no term
            successors = successors.masked_fill(unscored.roll(-1, dims=1).flatten()[rows], -100)
        counts = (real.numel(), real.shape[0] // 2, None)
        return cls._of(rows, successors, sequence, completion, *counts, objective)

    @classmethod
    def of_packed(cls, batch: PackedBatch, **objective: Any) -> "FusedBatch":
        """From a packed batch."""
        return cls._of(
            batch.rows,
            batch.targets,
            batch.sequence,
            batch.completion,
            batch.input_ids.numel(),
            len(batch.segments),
            batch.num_scored[objective["nll_scope"]],
            objective,
        )

    @classmethod
    def _of(
        cls,
        rows: Tensor,
        successors: Tensor,
        sequence: Tensor,
        completion: Tensor,
        positions: int,
        pairs: int,
        num_scored: int | None,
        objective: dict[str, Any],
    ) -> "FusedBatch":
        # Rejected prompts are in no term of the loss, and chosen ones neither if only completions
        # count, so their rows have no target.
        scored = completion
        if objective["nll_scope"] == "full":
            scored = scored | (sequence < pairs)
        targets = successors.masked_fill(~scored, -100)
        counts = (positions, pairs, num_scored)
        return cls(rows, targets, sequence, completion, *counts, **objective)

    def whole_pairs(self) -> Tensor:
        """Which pairs have completion tokens on both sides, `(B,)`."""
        counts = self.sequence.new_zeros(2 * self.num_pairs)
        counts.index_add_(0, self.sequence, self.completion.to(counts.dtype))
        return (counts.view(2, -1) > 0).all(dim=0)


@dataclass
class FusedOutput:
    """The results of a model for a [`FusedBatch`]: [`LinearORPOOutput`], and its own `aux_loss`."""

    loss: Tensor
    nll_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds_chosen: Tensor
    log_odds_ratio: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    empty_completions: Tensor
    aux_loss: Tensor | None = None


# The probed logit map of each model.
_LOGIT_MAPS: WeakKeyDictionary[nn.Module, LogitMap] = WeakKeyDictionary()


def check(model: nn.Module) -> LogitMap:
    """
    Finds out by a trial what a model does between its head and its logits. Nothing is changed.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model.

    Raises:
        [`HeadMismatch`]: If the loss cannot be computed in this model's head, with the reason.
    """
    core = core_of(model)
    _LOGIT_MAPS[core] = found = probe_head(core)
    return found


def fused_loss(model: nn.Module, batch: FusedBatch, *args: Any, **kwargs: Any) -> FusedOutput:
    """
    Runs a model, with any wrappers, and computes the loss instead of its logits.

    During the call its output head has another forward. The model is not changed otherwise.

    Args:
        model (`nn.Module`): The model, or its wrapper by DDP, FSDP, DeepSpeed or PEFT.
        batch ([`FusedBatch`]): The rows that predict, and the objective.
        args (`Any`): Arguments of the model.
        kwargs (`Any`): Keyword arguments of the model.

    Raises:
        [`HeadMismatch`]: If the loss cannot be computed in this model's head.
        RuntimeError: If the model calls its head in another way than in the trial.
    """
    core = core_of(model)
    logit_map = _LOGIT_MAPS.get(core) or check(core)
    head = find_head(core)
    results: list[LinearORPOOutput] = []

    def forward(hidden: Tensor) -> Tensor:
        result = _loss(head, hidden, batch, logit_map)
        results.append(result)
        # Replaces the logits in the model's code. It depends on the loss, and the loss on it, so
        # that the hooks of FSDP and ZeRO-3 on the output of a module run.
        return (result.loss * 0.0).expand(*hidden.shape[:-1], 1)

    with ModuleForward(head, forward):
        outputs = model(*args, **kwargs)
    if len(results) != 1:
        raise RuntimeError(
            f"{type(core).__name__} called its output head {len(results)} times, must be once; "
            "set use_fused_head=False"
        )
    # With layers on several devices, the head may be on another one than the inputs.
    device = batch.rows.device
    stats = {name: value.to(device) for name, value in results[0]._asdict().items()}
    logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
    stats["loss"] = stats["loss"] + 0.0 * logits.float().sum().to(device)
    return FusedOutput(**stats, aux_loss=getattr(outputs, "aux_loss", None))


def _loss(
    head: nn.Module, hidden: Tensor, batch: FusedBatch, logit_map: LogitMap
) -> LinearORPOOutput:
    if hidden.shape[:-1].numel() != batch.positions:
        raise RuntimeError(
            f"the output head got hidden states {tuple(hidden.shape)} for {batch.positions} "
            "positions; set use_fused_head=False"
        )
    weight, bias = head_weight(head), head_bias(head)
    device = hidden.device.type
    hidden = hidden.reshape(-1, hidden.shape[-1])
    hidden = hidden.index_select(0, batch.rows.to(hidden.device))
    # What autocast would do to the head. On a CPU tensors stay as they are, and are rounded within
    # the products.
    casts = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else weight.dtype
    rounds = device == "cpu" and dtype == torch.bfloat16
    if device == "cpu":
        dtype = weight.dtype
    if dtype == torch.float16:
        # Gradients are computed here, before the loss is scaled up, and would underflow.
        dtype = torch.float32
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False), bf16_products(rounds):
        return linear_orpo(
            hidden,
            weight,
            batch.targets.to(hidden.device),
            batch.sequence.to(hidden.device),
            batch.completion.to(hidden.device),
            batch.beta,
            bias=bias,
            softcap=logit_map.softcap,
            logit_scale=logit_map.scale,
            nll_scope=batch.nll_scope,
            odds_ratio_link=batch.odds_ratio_link,
            num_pairs=batch.num_pairs,
            num_scored=batch.num_scored,
            logits_budget=batch.logits_budget,
        )
