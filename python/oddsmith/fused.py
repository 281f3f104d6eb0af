"""The fused head inside a model's own forward.

The trainer must go through the model it was given (DDP, FSDP, autocast and adapters all hook into
its call), yet never see its logits. So the model's `forward` gets one more keyword: with it, the
output head hands its input to [`~oddsmith.functional.linear_orpo`] instead of multiplying, and what
comes back is the loss. Without it the model is what it was.
"""

from functools import partial, update_wrapper
from typing import Any, NamedTuple

import torch
from torch import nn

from .functional import linear_orpo

# A token that the head returns in place of logits. What the model does to logits after the head (a
# cap, a scale) is part of the loss already and harmless to it.
_KEYWORD = "orpo_batch"


class HeadTransform(NamedTuple):
    """What a model does to the product of hidden states and output embeddings."""

    softcap: float | None
    logit_scale: float


class Rows(NamedTuple):
    """The rows of a padded batch that predict, as [`~oddsmith.functional.linear_orpo`] names them.

    Args:
        index (`Tensor`): Position of each row in the flattened `(2B, T)` batch, `(N,)`.
        targets (`Tensor`): Next token, or -100 where the loss needs no score, `(N,)`.
        sequence (`Tensor`): Row of the batch, `(N,)`.
        completion (`Tensor`): True where the next token belongs to the completion, `(N,)`.
    """

    index: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    completion: torch.Tensor


def predicting_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> Rows:
    """
    Rows of a batch of B chosen and B rejected sequences that predict a real token.

    Args:
        input_ids (`Tensor`): `(2B, T)`.
        attention_mask (`Tensor`): `(2B, T)`, 0 on pads.
        labels (`Tensor`): `(2B, T)`, negative on prompts and pads.
    """
    count, length = input_ids.shape
    real = (attention_mask[:, 1:] == 1) & (attention_mask[:, :-1] == 1)
    sequence, position = real.nonzero(as_tuple=True)
    following = input_ids[sequence, position + 1]
    completion = labels[sequence, position + 1] >= 0
    scored = completion | (sequence < count // 2)
    targets = torch.where(scored, following, -100)
    return Rows(sequence * length + position, targets, sequence, completion)


def base_model(model: nn.Module) -> nn.Module:
    """The model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head's own layer, under PEFT's copy for `modules_to_save`."""
    head = base_model(model).get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is not None:
        active = head.active_adapter
        active = active[0] if isinstance(active, (list, tuple)) else active
        head = copies[active] if active in copies else head.original_module
    return head


def head_transform(config: Any) -> HeadTransform:
    """What the configuration says is done to logits: Gemma's cap, Cohere's and Granite's scale."""
    config = config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return HeadTransform(softcap, scale)


def obstacle(model: nn.Module) -> str | None:
    """Why the fused head cannot serve a model, or `None` if it can.

    What the configuration says is checked against the model itself, on a few random tokens.
    """
    core = base_model(model)
    if core.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(model, "active_peft_config", None) is not None:
        if model.active_peft_config.is_prompt_learning:
            return "its adapter puts virtual tokens before the batch"
    head = output_head(model)
    weight = getattr(head, "weight", None)
    plain = isinstance(head, nn.Linear) and not hasattr(head, "base_layer")
    if not plain or weight.shape != (head.out_features, head.in_features):
        return f"its output head is a {type(head).__name__}, not a plain linear layer"
    if not weight.is_floating_point():
        return f"its output head is stored as {weight.dtype}"
    if weight.device.type == "meta" or hasattr(weight, "ds_id") or weight.numel() == 0:
        return "its output head is not in memory, so what it does to logits cannot be checked"
    return _mismatch(core, head, head_transform(core.config))


def _mismatch(core: nn.Module, head: nn.Linear, transform: HeadTransform) -> str | None:
    """Compares a model's logits with what the fused head would make of its hidden states."""
    seen = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    training = core.training
    core.eval()
    try:
        device = core.get_input_embeddings().weight.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(head.out_features, (1, 5), generator=generator).to(device)
        with torch.no_grad():
            logits = core(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
        core.train(training)
    if len(seen) != 1 or seen[0].shape[:2] != ids.shape:
        return "it does not call its output head once for all positions"
    bias = None if head.bias is None else head.bias.float()
    expected = nn.functional.linear(seen[0].float(), head.weight.float(), bias)
    expected = expected * transform.logit_scale
    if transform.softcap is not None:
        expected = transform.softcap * torch.tanh(expected / transform.softcap)
    # Room for logits rounded to the model's dtype.
    room = 64 * torch.finfo(logits.dtype).eps * (1.0 + expected.abs().max())
    if logits.shape != expected.shape or (logits.float() - expected).abs().max() > room:
        return "it does something to its logits that the fused head does not know"
    return None


def attach(model: nn.Module) -> None:
    """Teach a model's `forward` the keyword that [`fused_forward`] uses. Idempotent."""
    core = base_model(model)
    if getattr(core.forward, "func", None) is not _forward:
        # A partial is copied and pickled with the model it belongs to; a closure is not.
        core.forward = update_wrapper(partial(_forward, core, core.forward), core.forward)


def fused_forward(model: nn.Module, rows: Rows, inputs: dict[str, Any], **options: Any) -> dict:
    """
    Run a model on a batch, with the ORPO loss in place of its logits.

    Args:
        model (`nn.Module`): A model that [`attach`] has seen, in whatever wrappers.
        rows (`Rows`): The rows of the batch that predict.
        inputs (`dict`): The model's own arguments.
        options (`dict`): Arguments of [`~oddsmith.functional.linear_orpo`] from `beta` on.

    Returns:
        `dict`: The fields of [`~oddsmith.functional.LinearORPOOutput`], and `aux_loss` where the
        model has one.
    """
    return model(**inputs, **{_KEYWORD: {**rows._asdict(), **options}})


def _forward(core: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    batch = kwargs.pop(_KEYWORD, None)
    if batch is None:
        return original(*args, **kwargs)
    head, results = output_head(core), []
    usual = head.__dict__.get("forward")
    # The head is still called as a module, so that its hooks (FSDP, ZeRO-3) run.
    head.forward = partial(_head_forward, head, head_transform(core.config), batch, results)
    try:
        outputs = original(*args, **kwargs)
    finally:
        if usual is None:
            del head.forward
        else:
            head.forward = usual
    out = results[0]._asdict()
    if getattr(outputs, "aux_loss", None) is not None:
        out["aux_loss"] = outputs.aux_loss
    return out


def _head_forward(
    head: nn.Linear,
    transform: HeadTransform,
    batch: dict[str, Any],
    results: list,
    hidden: torch.Tensor,
) -> torch.Tensor:
    rows, device = dict(batch), hidden.device
    index = rows.pop("index").to(device)
    beta = rows.pop("beta")
    named = {name: rows.pop(name).to(device) for name in ("targets", "sequence", "completion")}
    weight, bias = head.weight, head.bias
    if device.type != "cpu" and torch.is_autocast_enabled(device.type):
        # As autocast would treat the layer. On the CPU products are in float32 in any case.
        dtype = torch.get_autocast_dtype(device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index).to(weight.dtype)
    results.append(
        linear_orpo(picked, weight, beta=beta, bias=bias, **named, **transform._asdict(), **rows)
    )
    return hidden.new_zeros(hidden.shape[0], 1, 1)
