"""The ORPO head as functions: from hidden states to log-probabilities and loss, without logits.

Both functions run the Rust core through custom operators, so they work outside the trainer, under
`torch.compile` without a graph break, and on any device. The logits of a batch are never held: see
`src/head` for the algorithm.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _autograd as torch_autograd

from .. import _core
from ..bf16_products import bf16_products
from .arguments import HeadArguments, Needs, ObjectiveArguments, PairArguments

__all__ = ["LinearORPOOutput", "linear_logps", "linear_orpo"]


class LinearORPOOutput(NamedTuple):
    """What [`linear_orpo`] returns. Only `loss` is differentiable.

    Statistics are `float32` (`float64` for `float64` inputs).

    Args:
        loss (`Tensor`): `nll_loss - beta * mean(link(log_odds_chosen))`, 0-dim.
        nll_loss (`Tensor`): Token mean of the negative log-likelihood of the chosen sequences, 0-dim.
        chosen_logps (`Tensor`): Mean completion log-probability of each chosen sequence, `(B,)`.
        rejected_logps (`Tensor`): Mean completion log-probability of each rejected sequence,
            `(B,)`.
        log_odds_chosen (`Tensor`): Log odds ratio of each pair, `(B,)`.
        log_odds_ratio (`Tensor`): Its log-sigmoid, `(B,)`.
        chosen_logits (`Tensor`): Mean logit over the chosen rows and the vocabulary, 0-dim.
        rejected_logits (`Tensor`): Mean logit over the rejected rows and the vocabulary, 0-dim.
        empty_completions (`Tensor`): Number of pairs with an empty side, 0-dim `int64`. They
            contribute nothing to the odds-ratio term, and have zeros in the fields above.
    """

    loss: Tensor
    nll_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds_chosen: Tensor
    log_odds_ratio: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    empty_completions: Tensor


def _products_of(hidden: Tensor) -> AbstractContextManager[None]:
    """The context of products with these rows: a CPU with bfloat16 instructions uses them."""
    return bf16_products(hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu")


def _statistics_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _gradients(wanted: tuple[bool, ...], hidden: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Shapes of the gradients that the core returns; those that are not needed are empty."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if want and x is not None
        else hidden.new_empty(0)
        for want, x in zip(wanted, (hidden, *others))
    ]


@torch.library.custom_op("oddsmith::linear_orpo", mutates_args=())
def _linear_orpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sequence: Tensor,
    completion: Tensor,
    beta: float,
    softcap: float | None,
    logit_scale: float,
    nll_scope: str,
    odds_ratio_link: str,
    num_pairs: int | None,
    num_scored: int | None,
    logits_budget: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    with _products_of(hidden):
        report = _core.linear_orpo(
            HeadArguments(hidden, weight, bias, targets, softcap, logit_scale),
            PairArguments(sequence, completion, num_pairs, num_scored),
            ObjectiveArguments(beta, nll_scope, odds_ratio_link, logits_budget),
            Needs(need_hidden, need_weight, need_bias),
        )
    gradients = report["gradients"]
    outputs = cast(dict[str, Any], report)
    return [
        *(outputs[name] for name in LinearORPOOutput._fields),
        gradients["hidden"],
        gradients["weight"],
        gradients["bias"],
    ]


@_linear_orpo.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    sequence,
    completion,
    beta,
    softcap,
    logit_scale,
    nll_scope,
    odds_ratio_link,
    num_pairs,
    num_scored,
    logits_budget,
    need_hidden,
    need_weight,
    need_bias,
):
    pairs = torch.library.get_ctx().new_dynamic_size() if num_pairs is None else num_pairs
    dtype = _statistics_dtype(hidden)
    one = [hidden.new_empty((), dtype=dtype) for _ in range(4)]
    each = [hidden.new_empty(pairs, dtype=dtype) for _ in range(4)]
    empty = hidden.new_empty((), dtype=torch.int64)
    gradients = _gradients((need_hidden, need_weight, need_bias), hidden, weight, bias)
    return [*one[:2], *each, *one[2:], empty, *gradients]


@torch.library.custom_op("oddsmith::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    need_expectation: bool,
) -> list[Tensor]:
    head = HeadArguments(hidden, weight, bias, targets, softcap, logit_scale)
    with _products_of(hidden):
        found = _core.linear_logps(head, need_expectation)
    return [found["logps"], found["lse"], found["expectation"]]


@_linear_logps.register_fake
def _(hidden, weight, bias, targets, softcap, logit_scale, need_expectation):
    rows = [hidden.new_empty(hidden.shape[0], dtype=_statistics_dtype(hidden)) for _ in range(2)]
    return [*rows, *_gradients((need_expectation,), hidden)]


@torch.library.custom_op("oddsmith::linear_logps_backward", mutates_args=())
def _linear_logps_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    lse: Tensor,
    d_logps: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    head = HeadArguments(hidden, weight, bias, targets, softcap, logit_scale)
    needs = Needs(need_hidden, need_weight, need_bias)
    with _products_of(hidden):
        gradients = _core.linear_logps_backward(head, lse, d_logps, needs)
    return [gradients["hidden"], gradients["weight"], gradients["bias"]]


@_linear_logps_backward.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    softcap,
    logit_scale,
    lse,
    d_logps,
    need_hidden,
    need_weight,
    need_bias,
):
    return _gradients((need_hidden, need_weight, need_bias), hidden, weight, bias)


# True while a backward pass keeps the graph for another one. If torch cannot tell, assume that it
# does.
_keeps_graph = getattr(torch_autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, in place if `gradient` is not needed afterwards.

    The gradient of the weight is as large as the weight, and the factor is usually one over the
    number of accumulation steps: a copy would double the memory and cost a pass.
    """
    if torch.compiler.is_compiling() or _keeps_graph():
        return gradient * factor.to(gradient.dtype)
    if _core.scale_gradient(gradient, factor):
        torch.autograd.graph.increment_version(gradient)
        return gradient
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return gradient
    return gradient.mul_(factor.to(gradient.dtype))


class _LinearORPO(torch.autograd.Function):
    """Gradients are computed together with the loss; backward scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, needs, *options):
        *outputs, d_hidden, d_weight, d_bias = _linear_orpo(hidden, weight, bias, *options, *needs)
        ctx.needs = needs
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        d_loss = grads[0]
        saved = zip(ctx.needs, ctx.saved_tensors)
        gradients = [_times(gradient, d_loss) if need else None for need, gradient in saved]
        return (*gradients, *[None] * 12)


class _LinearLogps(torch.autograd.Function):
    """With a frozen head, forward computes `d logps / d hidden` up to one factor per row."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, needs, targets, softcap, logit_scale):
        frozen = needs == (True, False, False)
        arguments = (hidden, weight, bias, targets)
        logps, lse, expectation = _linear_logps(*arguments, softcap, logit_scale, frozen)
        ctx.needs, ctx.options, ctx.frozen = needs, (softcap, logit_scale), frozen
        ctx.save_for_backward(*([expectation] if frozen else [*arguments, lse]))
        return logps

    @staticmethod
    def backward(ctx, *grads):
        (d_logps,) = grads
        if ctx.frozen:
            (expectation,) = ctx.saved_tensors
            gradients = [-expectation * d_logps.to(expectation.dtype)[:, None], None, None]
        else:
            *arguments, lse = ctx.saved_tensors
            gradients = _linear_logps_backward(
                *arguments, *ctx.options, lse, d_logps.contiguous(), *ctx.needs
            )
            gradients = [x if need else None for need, x in zip(ctx.needs, gradients)]
        return (*gradients, *[None] * 4)


def _same_device(op: str, hidden: Tensor, **others: Tensor | None) -> None:
    """Check devices before the dispatcher, which picks a kernel by the first tensor's device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}; must be on the device of hidden, {hidden.device}"
            )


def _needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    enabled = torch.is_grad_enabled()
    return (
        enabled and hidden.requires_grad,
        enabled and weight.requires_grad,
        enabled and bias is not None and bias.requires_grad,
    )


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-probabilities of target tokens under a linear head, without the logits.

    Equivalent to this code, which holds `(N, V)` logits several times:

    ```python
    z = logit_scale * (hidden @ weight.T + bias)
    logits = softcap * torch.tanh(z / softcap)
    logps = logits.float().log_softmax(-1)[torch.arange(N), targets]  # 0 where targets is -100
    ```

    Products are accumulated in `float32`; on a CPU half-precision inputs are widened first, unless
    they are `bfloat16` and it has instructions for that. With
    a frozen head, forward and backward together cost two matrix products of all rows with the
    weight; with a trained one, four.

    Args:
        hidden (`Tensor`): Hidden states, `(N, D)`, `float32`, `bfloat16`, `float16` or `float64`.
        weight (`Tensor`): Output embeddings, `(V, D)`, same dtype and device.
        targets (`Tensor`): `(N,)` `int64`, tokens in `0..V`, or -100 for a row that needs no score.
        bias (`Tensor`, *optional*): `(V,)`, same dtype and device.
        softcap (`float`, *optional*): Bound on the logits (Gemma 2's `final_logit_softcapping`).
        logit_scale (`float`, *optional*, defaults to 1.0): Factor on the products (Cohere's
            `logit_scale`, the inverse of Granite's `logits_scaling`).

    Returns:
        `Tensor`: `(N,)`, `float32` (`float64` for `float64` inputs), 0 where the target is -100.

    Raises:
        ValueError: For a shape, device or value that does not fit; the message names the argument.
        TypeError: For a dtype that does not fit.
    """
    _same_device("linear_logps", hidden, weight=weight, targets=targets, bias=bias)
    needs = _needs(hidden, weight, bias)
    return _LinearLogps.apply(hidden, weight, bias, needs, targets, softcap, logit_scale)


def linear_orpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequence: Tensor,
    completion: Tensor,
    beta: float,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    nll_scope: str = "full",
    odds_ratio_link: str = "logsigmoid",
    num_pairs: int | None = None,
    num_scored: int | None = None,
    logits_budget: int | None = None,
) -> LinearORPOOutput:
    """The ORPO loss of a batch of pairs from the hidden states that predict its tokens.

    Hong et al. 2024 (arXiv 2403.07691), equations 4 to 7. With `c` and `r` the mean completion
    log-probabilities of a pair and `log1mexp(x) = log(1 - exp(x))`:

    ```python
    log_odds = (c - r) - (log1mexp(c) - log1mexp(r))
    loss = nll - beta * logsigmoid(log_odds).mean()
    ```

    Loss and gradients are finite for every finite input, also for tokens of probability one and
    empty completions. The gradients are computed together with the loss: two matrix products of the
    scored rows with the weight if the head is frozen, three if it is trained, four if a pair's
    logits do not fit `logits_budget`.

    Args:
        hidden (`Tensor`): `(N, D)`, one row per position that predicts a token, in any order;
            `float32`, `bfloat16`, `float16` or `float64`.
        weight (`Tensor`): Output embeddings, `(V, D)`, same dtype and device.
        targets (`Tensor`): `(N,)` `int64`, the token that each row predicts, or -100 for a row that
            needs no score (rejected prompts): it only counts in the mean logits.
        sequence (`Tensor`): `(N,)` `int64`, the sequence of each row: chosen ones `0..B`, rejected
            ones `B..2B` in the same order.
        completion (`Tensor`): `(N,)` `bool`, true where the target is a completion token.
        beta (`float`): Weight of the odds-ratio term, positive.
        bias (`Tensor`, *optional*): `(V,)`, same dtype and device.
        softcap (`float`, *optional*): Bound on the logits, as in [`linear_logps`].
        logit_scale (`float`, *optional*, defaults to 1.0): Factor on the products.
        nll_scope (`str`, *optional*, defaults to `"full"`): `"full"` counts prompt and completion
            of the chosen sequences in the negative log-likelihood (TRL), `"completion"` only the
            completion.
        odds_ratio_link (`str`, *optional*, defaults to `"logsigmoid"`): `"logsigmoid"` is the paper
            and TRL; `"identity"` uses the raw log odds ratio, which is unbounded.
        num_pairs (`int`, *optional*): `B`. Read from `sequence` if not given.
        num_scored (`int`, *optional*): Number of rows in the loss: those with a target, of a
            completion or, if `nll_scope` is `"full"`, of a chosen sequence. Counted if not given.
            With it and `num_pairs` the host does not wait for a CUDA device, and values are not
            checked there: the loss is NaN if the number, a target or a sequence is wrong.
        logits_budget (`int`, *optional*): Bytes of logits that a trained head may keep for its
            backward pass.

    Returns:
        [`LinearORPOOutput`]: The loss and its parts.

    Raises:
        ValueError: For a shape, device or value that does not fit; the message names the argument.
        TypeError: For a dtype that does not fit.
    """
    rows = {"targets": targets, "sequence": sequence, "completion": completion}
    _same_device("linear_orpo", hidden, weight=weight, bias=bias, **rows)
    outputs = _LinearORPO.apply(
        hidden,
        weight,
        bias,
        _needs(hidden, weight, bias),
        targets,
        sequence,
        completion,
        float(beta),
        softcap,
        logit_scale,
        nll_scope,
        odds_ratio_link,
        num_pairs,
        num_scored,
        logits_budget,
    )
    return LinearORPOOutput(*outputs)
