"""The loss and metrics of a batch: the hooks of TRL's trainer that subclasses override."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..data.collator import PairBatch
from ..data.image_collator import both_sides
from ..head import logits as plain
from ..integrations import model_attention, model_head
from ..integrations.model_packing import RowLimits
from ..integrations.row_dependence import virtual_tokens
from ..packing.batch import PackedBatch
from .image_filler import ImageFiller
from .metrics import (
    BatchWeights,
    PairScores,
    Split,
    batch_share,
    evaluation_weights,
    pair_metrics,
)
from .overrides import is_overridden
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)

# If a subclass overrides one of these, the loss is computed through them.
LOSS_HOOKS = ("concatenated_forward", "get_batch_logps", "odds_ratio_loss")


class LossHooks(TrainerParts):
    """
    Part of [`~oddsmith.ORPOTrainer`]: how a batch becomes a loss.

    In the model's output head by default; from logits, through the hooks, if the head does not
    support it or a hook is overridden.
    """

    # Why the loss is computed from logits even without overridden hooks, or None.
    _plain_because: str | None = None
    # Why batches keep their padding; None if they are packed.
    _padded_because: str | None = None
    # The ImageRows of a dataset with images, and None for one of text.
    _image_rows: Any = None
    # Keeps the processes together whose vision parts are split.
    _filler: ImageFiller | None = None
    # The packed rows that the model computes as it does a padded batch.
    _row_limits: RowLimits = RowLimits()
    _said_of_limits = False
    # Weights of the last batch in the logged averages.
    _batch_weights: BatchWeights = BatchWeights()
    # Whether the batch of an evaluation step only repeats pairs, because others have one.
    _fills_up = False
    # The last loss of an evaluation, and its mean over tokens.
    _own_loss: tuple[Tensor, Tensor] | None = None

    def _own_loss_hooks(self) -> list[str]:
        """The hooks that a subclass overrides."""
        return [name for name in LOSS_HOOKS if is_overridden(self, LossHooks, name)]

    @staticmethod
    def concatenated_inputs(
        batch: dict[str, Any],
        is_encoder_decoder: bool = False,
        padding_value: int = 0,
        device: torch.device | None = None,
    ) -> dict[str, Tensor]:
        """
        Concatenate the two sides of a batch, chosen sequences first.

        Args:
            batch (`dict`): A batch with `chosen_*` and `rejected_*` tensors `(B, T)`.
            is_encoder_decoder (`bool`, *optional*): Kind of the model.
            padding_value (`int`, *optional*): Token id that pads the shorter side.
            device (`torch.device`, *optional*): Device of the result.

        Returns:
            `dict[str, Tensor]`: `concatenated_input_ids` and the like, `(2B, T)`.
        """
        return plain.concatenate(batch, is_encoder_decoder, padding_value, device)

    def odds_ratio_loss(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """
        The odds ratio term from mean log-probabilities.

        Args:
            policy_chosen_logps (`Tensor`): Those of the chosen completions, `(B,)`.
            policy_rejected_logps (`Tensor`): Those of the rejected completions, `(B,)`.

        Returns:
            `tuple`: `beta * link(log_odds)` of each pair, which the loss subtracts; rewards of the
                chosen and rejected side; means of the log-sigmoid of the log odds and of the log
                odds.
        """
        log_odds = plain.log_odds(policy_chosen_logps, policy_rejected_logps)
        ratio = F.logsigmoid(log_odds)
        linked = ratio if self.args.odds_ratio_link == "logsigmoid" else log_odds
        chosen, rejected = (
            self.beta * plain.wide(logps.detach()).to(self.accelerator.device)
            for logps in (policy_chosen_logps, policy_rejected_logps)
        )
        # Evaluated in float64; a loss in float32 stays one.
        dtype = plain.wide(policy_chosen_logps).dtype
        means = ratio.mean().to(dtype), log_odds.mean().to(dtype)
        return (self.beta * linked).to(dtype), chosen, rejected, *means

    @staticmethod
    def get_batch_logps(
        logits: Tensor,
        labels: Tensor,
        average_log_prob: bool = False,
        is_encoder_decoder: bool = False,
    ) -> Tensor:
        """
        Log-probabilities of the labels of each sequence.

        Args:
            logits (`Tensor`): `(B, T, V)`.
            labels (`Tensor`): `(B, T)`; negative ones do not count.
            average_log_prob (`bool`, *optional*): Per token instead of in total.
            is_encoder_decoder (`bool`, *optional*): Whether labels and logits are aligned.

        Returns:
            `Tensor`: `(B,)`; 0 for a sequence without labels.

        Raises:
            ValueError: If the shapes do not match.
        """
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; must be that of the logits without the "
                f"vocabulary, {tuple(logits.shape[:-1])}"
            )
        if not is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return plain.sequence_logps(logits, labels, average_log_prob)

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """
        Run the model on both sides of a batch at once, with logits.

        Not called if the fused head computes the loss, unless a subclass overrides it.

        Returns:
            `tuple`: Mean log-probabilities of chosen and rejected completions, `(B,)`; their logits
            `(B, T, V)`; the negative log-likelihood; and the auxiliary loss of a mixture of experts
            if its configuration has `output_router_logits`.
        """
        self._borrow()
        inputs = self._concatenated(batch)
        labels = inputs["concatenated_labels"]
        extra: dict[str, Any] = both_sides(batch, inputs)
        inputs, extra = self._with_vision(inputs, extra)
        if self.is_encoder_decoder:
            extra["decoder_input_ids"] = plain.shift_right(
                labels, self.decoder_start_token_id, self.pad_token_id
            )
        outputs = self._run(model, inputs, **extra)
        logits = outputs.logits
        if self._filler is not None:
            logits = logits[: labels.shape[0], : labels.shape[1]]
        core: Any = self.accelerator.unwrap_model(model)
        if not self.is_encoder_decoder and virtual_tokens(core):
            # Logits of virtual tokens come first; those of prefixes are not computed.
            logits = logits[:, logits.shape[1] - labels.shape[1] :]
        logps = self.get_batch_logps(
            logits, labels, average_log_prob=True, is_encoder_decoder=self.is_encoder_decoder
        )
        labels = self._likelihood_labels(inputs)
        if not self.is_encoder_decoder:
            logits = logits[:, :-1]
        pairs = labels.shape[0] // 2
        nll = plain.token_nll(logits[:pairs], labels[:pairs].to(logits.device))
        scores = (logps[:pairs], logps[pairs:], logits[:pairs], logits[pairs:], nll)
        return (*scores, outputs.aux_loss) if self.aux_loss_enabled else scores

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Split = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Loss and metrics of a batch.

        Returns:
            `tuple`: The loss, and the metrics as 0-dim tensors on the device, with the prefix
            `eval_` in an evaluation.
        """
        self._borrow()
        if self.args.beta_schedule != "constant" and self.state.max_steps > 0:
            self._scheduled_beta = self.args.beta_at(self.state.global_step, self.state.max_steps)
        uses_logits = self._plain_because is not None or bool(self._own_loss_hooks())
        scores = (self._plain_scores if uses_logits else self._fused_scores)(model, batch)
        pairs, self._batch_weights = scores.whole.shape[0], BatchWeights()
        prefix = "eval_" if train_eval == "eval" else ""
        if train_eval == "eval":
            pairs = 0 if self._fills_up else batch_share(self.accelerator, pairs)
            self._batch_weights = evaluation_weights(scores, pairs, prefix)
        metrics = pair_metrics(scores, pairs)
        loss = scores.loss
        if self.aux_loss_enabled:
            aux_loss = torch.as_tensor(scores.aux_loss, device=loss.device)
            loss = loss + self.aux_loss_coef * aux_loss
        # Not in training, where it would keep the graph of a step until the next one.
        self._own_loss = (loss, scores.nll_loss) if train_eval == "eval" else None
        return loss, {f"{prefix}{name}": value for name, value in metrics.items()}

    # ---- Scores: fused head or logits ----

    def _likelihood_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        """Targets of the likelihood term, aligned with the logits that are used for it."""
        labels = inputs["concatenated_labels"]
        if self.is_encoder_decoder:
            return labels
        if self.args.nll_scope == "full":
            ids = inputs["concatenated_input_ids"]
            labels = torch.where(inputs["concatenated_attention_mask"] == 1, ids, -100)
            if (images := self._image_tokens(ids)) is not None:
                labels = labels.masked_fill(images, -100)
        return labels[:, 1:]

    def _concatenated(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = self.concatenated_inputs(
            batch,
            is_encoder_decoder=self.is_encoder_decoder,
            padding_value=self.padding_value,
            device=self.accelerator.device,
        )
        # Any negative label is masked; the hooks may expect TRL's label.
        labels = inputs["concatenated_labels"]
        return {**inputs, "concatenated_labels": torch.where(labels < 0, -100, labels)}

    def _image_tokens(self, ids: Tensor) -> Tensor | None:
        """Which tokens stand for images, and so are no text to learn; None without images."""
        if self._image_rows is None:
            return None
        known = torch.tensor(sorted(self._image_rows.image_token_ids), device=ids.device)
        return torch.isin(ids, known)

    def _with_vision(
        self, inputs: dict[str, Tensor], extra: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The inputs, with a sequence that has an image if a batch of another process has one."""
        if self._filler is None:
            return inputs, extra
        return self._filler.fill(inputs, extra, self.padding_value)

    def _run(self, model: Callable[..., Any], inputs: dict[str, Tensor], **extra: Any) -> Any:
        if self.aux_loss_enabled:
            extra["output_router_logits"] = True
        return model(
            inputs["concatenated_input_ids"],
            attention_mask=inputs["concatenated_attention_mask"],
            use_cache=False,
            **extra,
        )

    def _fused_scores(self, model: nn.Module, batch: dict[str, Any]) -> PairScores:
        objective = {
            "beta": self.beta,
            "nll_scope": self.args.nll_scope,
            "odds_ratio_link": self.args.odds_ratio_link,
            "logits_budget": self.args.logits_budget,
        }
        packed = self._packed(batch) if self._padded_because is None else None
        if packed is not None:
            rows = model_head.FusedBatch.of_packed(packed, **objective)
            inputs = model_attention.packed_inputs(packed, router=self.aux_loss_enabled)
            out = model_head.fused_loss(model, rows, **inputs, use_cache=False)
            model_attention.check_seen(inputs)
        else:
            inputs = self._concatenated(batch)
            sequences = len(inputs["concatenated_labels"])
            inputs, extra = self._with_vision(inputs, both_sides(batch, inputs))
            mask = inputs["concatenated_attention_mask"]
            if len(mask) > sequences:
                mask = mask.clone()
                mask[sequences:] = 0
            rows = model_head.FusedBatch.build(
                inputs["concatenated_input_ids"],
                mask,
                inputs["concatenated_labels"],
                unscored=self._image_tokens(inputs["concatenated_input_ids"]),
                **objective,
            )
            run = partial(model_head.fused_loss, model, rows)
            out = self._run(run, inputs, **extra)
        return PairScores(
            loss=out.loss,
            nll_loss=out.nll_loss,
            chosen_logps=out.chosen_logps,
            rejected_logps=out.rejected_logps,
            chosen_rewards=self.beta * out.chosen_logps,
            rejected_rewards=self.beta * out.rejected_logps,
            log_odds_ratio=out.log_odds_ratio,
            log_odds_chosen=out.log_odds_chosen,
            chosen_logits=out.chosen_logits,
            rejected_logits=out.rejected_logits,
            whole=rows.whole_pairs(),
            aux_loss=out.aux_loss,
            nll_tokens=((rows.targets >= 0) & (rows.sequence < rows.num_pairs)).sum(),
            chosen_tokens=(rows.sequence < rows.num_pairs).sum(),
            rejected_tokens=(rows.sequence >= rows.num_pairs).sum(),
        )

    def _packed(self, batch: dict[str, Any]) -> PackedBatch | None:
        """The batch as a packed row, on the device; None if it must keep its padding."""
        packed = batch.packed() if isinstance(batch, PairBatch) else None
        if packed is None:  # another collator, or changed after packing
            packed = PackedBatch.from_padded(batch, self.args.share_prompt)
        if not self._row_limits.allow(packed):
            if not self._said_of_limits:
                self._said_of_limits = True
                logger.warning(
                    f"A batch keeps its padding: the model is packed for {self._row_limits} only. "
                    "This is logged once."
                )
            return None
        return packed.to(self.accelerator.device)

    def _plain_scores(self, model: nn.Module, batch: dict[str, Any]) -> PairScores:
        chosen, rejected, chosen_logits, rejected_logits, nll, *aux = self.concatenated_forward(
            model, batch
        )
        inputs = self._concatenated(batch)
        labels, mask = inputs["concatenated_labels"], inputs["concatenated_attention_mask"]
        real = labels >= 0
        if not self.is_encoder_decoder:
            real = real[:, 1:]
            whole, counted = _whole_pairs(labels[:, 1:]), (mask[:, 1:] & mask[:, :-1]) != 0
        else:
            whole, counted = _whole_pairs(labels), real
        whole, pairs = whole.to(chosen.device), whole.shape[0]
        # An empty completion has no odds: its pair is excluded from the term and the averages.
        kept = slice(None) if bool(whole.all()) else whole
        if not bool(whole.any()):
            zero = chosen.detach().float()[:0].sum()
            term, rewards, means = zero, (zero, zero), (zero, zero)
        else:
            terms, *rewards_and_means = self.odds_ratio_loss(chosen[kept], rejected[kept])
            term = terms.mean() * whole.to(terms.dtype).mean()
            rewards, means = rewards_and_means[:2], rewards_and_means[2:]
        return PairScores(
            loss=nll - term,
            nll_loss=nll.detach(),
            chosen_logps=chosen.detach(),
            rejected_logps=rejected.detach(),
            chosen_rewards=_scattered(rewards[0], whole),
            rejected_rewards=_scattered(rewards[1], whole),
            log_odds_ratio=means[0].detach(),
            log_odds_chosen=means[1].detach(),
            chosen_logits=_mean_logit(chosen_logits, counted[:pairs]),
            rejected_logits=_mean_logit(rejected_logits, counted[pairs:]),
            whole=whole,
            aux_loss=aux[0] if aux else None,
            nll_tokens=self._likelihood_labels(inputs)[:pairs].ge(0).sum(),
            chosen_tokens=counted[:pairs].sum(),
            rejected_tokens=counted[pairs:].sum(),
        )


def _whole_pairs(labels: Tensor) -> Tensor:
    """Which pairs have completion tokens on both sides, `(B,)`, from labels `(2B, T)`."""
    present = (labels >= 0).any(dim=1)
    return present.view(2, -1).all(dim=0)


def _scattered(rewards: Tensor, whole: Tensor) -> Tensor:
    """Rewards of complete pairs at their indices, `(B,)`."""
    out = rewards.new_zeros(whole.shape)
    out[whole] = rewards.detach()
    return out


def _mean_logit(logits: Tensor, counted: Tensor) -> Tensor:
    """Mean of `logits` `(B, T, V)` over the vocabulary and the `counted` `(B, T)` positions."""
    logits = logits.detach()
    if logits.shape[:2] != counted.shape:  # an overridden hook: over all positions, as TRL
        return logits.mean()
    per_position = logits.float().mean(dim=-1)
    counted = counted.to(logits.device)
    return (per_position * counted).sum() / counted.sum().clamp(min=1)
