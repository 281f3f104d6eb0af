"""The trainers that `python -m benches.gpu` sets side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .bench import importable
from .models import Shape, with_their_layers

BETA = 0.1


def orpo_loss(logps, tokens, labels):
    """Of a padded batch, the chosen half first; `tokens` and `labels` are -100 where nothing counts."""
    half = len(logps) // 2
    answer = labels != -100
    means = (logps * answer).sum(1) / answer.sum(1)
    chosen, rejected = means[:half], means[half:]
    log_odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    nll = -(logps * (tokens != -100))[:half].sum() / (tokens[:half] != -100).sum()
    return nll - BETA * F.logsigmoid(log_odds).mean()


def liger_trainer(base: type) -> type:
    """TRL's loop around Liger's fused loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    class Trainer(head_trainer(base)):
        def loss_of(self, hidden, weight, tokens, labels):
            loss = LigerFusedLinearORPOLoss(beta=BETA, compiled=hidden.is_cuda)
            return loss(weight, hidden, labels, nll_target=tokens)[0]

    return Trainer


def cut_trainer(base: type) -> type:
    """TRL's loop around cut-cross-entropy's log-probabilities."""
    from cut_cross_entropy import linear_cross_entropy

    class Trainer(head_trainer(base)):
        def loss_of(self, hidden, weight, tokens, labels):
            logps = -linear_cross_entropy(hidden, weight, tokens, reduction="none")
            return orpo_loss(logps, tokens, labels)

    return Trainer


def head_trainer(base: type) -> type:
    """A trainer whose loss is computed from hidden states and the head's weight."""

    class Trainer(base):
        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            parts = self.concatenated_inputs(
                batch, padding_value=self.padding_value, device=self.accelerator.device
            )
            ids, mask = parts["concatenated_input_ids"], parts["concatenated_attention_mask"]
            core = self.accelerator.unwrap_model(model)
            core = core.get_base_model() if hasattr(core, "get_base_model") else core
            with self.accelerator.autocast():
                out = core.model(ids, attention_mask=mask, use_cache=False)
                hidden, weight = out.last_hidden_state[:, :-1], core.lm_head.weight
                dtype = torch.bfloat16 if hidden.is_cuda else hidden.dtype
                tokens = torch.where(mask == 1, ids, -100)[:, 1:].contiguous()
                labels = parts["concatenated_labels"][:, 1:].contiguous()
                hidden = hidden.to(dtype).contiguous()
                return self.loss_of(hidden, weight.to(dtype), tokens, labels), {}

    return Trainer


def trainer_kinds(shape: Shape) -> Iterator[tuple[str, Callable, Callable, dict]]:
    """Name, what makes the trainer and its arguments, what adapts the model, and more arguments."""
    import oddsmith

    ours = oddsmith.ORPOTrainer, oddsmith.ORPOConfig
    # The article's optimiser; the peers have it from bitsandbytes.
    optim = {"optim": "paged_adamw_8bit"} if shape.nf4 else {}
    yield "oddsmith, packed", ours, lambda model: model, optim
    yield "oddsmith, padded", ours, lambda model: model, {**optim, "padding_free": False}
    if not shape.nf4:
        # 4 GB of state pass through 256 MiB of the GPU's memory.
        paged = {"optim": "paged_adamw_32bit", "optim_args": f"device_budget={256 << 20}"}
        yield "oddsmith, packed, paged", ours, lambda model: model, paged
    if not importable("trl"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    layers = with_their_layers if shape.nf4 and importable("bitsandbytes") else lambda model: model
    name = "TRL" + (", bitsandbytes" if layers is with_their_layers else "")
    yield name, (ORPOTrainer, ORPOConfig), layers, {}
    if importable("liger_kernel"):
        yield f"{name}, Liger", (liger_trainer(ORPOTrainer), ORPOConfig), layers, {}
    if importable("cut_cross_entropy") and torch.cuda.is_available():
        yield f"{name}, CCE", (cut_trainer(ORPOTrainer), ORPOConfig), layers, {}
