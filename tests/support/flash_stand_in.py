"""The package flash_attn, computed by its definition on the CPU."""

import sys
from types import ModuleType

import torch
import transformers.modeling_flash_attention_utils as utils
from transformers.utils import import_utils

from oddsmith.packing import attention_cuda


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    """Block by block, causal at the lower right; 16-bit only, and one width, as the package."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == v.shape[-1] <= 256 and causal and not dropout_p
    groups, out = q.shape[1] // k.shape[1], []
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    bounds = zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:])
    for first, end, first_key, end_key in bounds:
        assert end - first <= max_seqlen_q and end_key - first_key <= max_seqlen_k
        a, b, c = q[first:end].float(), k[first_key:end_key].float(), v[first_key:end_key].float()
        scores = torch.einsum("qhd,khd->hqk", a, b) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(b) - len(a), len(b))[:, None] - torch.arange(len(b))
        seen = distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, c))
    return torch.cat(out).to(q.dtype)


def flash_attn_func(q, k, v, **kwargs):
    rows, length = q.shape[:2]
    bounds = torch.arange(rows + 1, dtype=torch.int32) * length
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, length, length, **kwargs)
    return out.unflatten(0, (rows, length))


def install(monkeypatch):
    """As if flash_attn were installed and the CPU were its device; returns the calls of its kernel
    for rows of variable length."""
    calls = []

    def varlen(*args, **kwargs):
        calls.append((args, kwargs))
        return flash_attn_varlen_func(*args, **kwargs)

    varlen.__signature__ = utils.inspect.signature(flash_attn_varlen_func)
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    found = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: found)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention_cuda, "DEVICES", ("cpu",))
    monkeypatch.setattr(attention_cuda, "_kernel", attention_cuda._kernel.__wrapped__)
    return calls
