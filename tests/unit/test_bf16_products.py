"""Products by a CPU's bfloat16 instructions: where they are used, and how far they are off."""

import pytest
import torch

from oddsmith import bf16_products as module
from oddsmith.bf16_products import bf16_products, cpu_has_bf16
from oddsmith.functional import linear_logps, linear_orpo
from oddsmith.integrations import model_head
from oddsmith.integrations.model_head import FusedBatch, fused_loss
from support.trainer_runs import make_model, make_tokenizer

SETTING = torch.backends.mkldnn.matmul


@pytest.fixture(params=[True, False])
def units(request, monkeypatch):
    monkeypatch.setattr(module, "_can_use_them", lambda: request.param)
    return request.param


def test_the_setting_is_restored(units):
    before = SETTING.fp32_precision
    with pytest.raises(KeyError), bf16_products(True):
        assert SETTING.fp32_precision == ("bf16" if units else before)
        with bf16_products(True):
            pass
        assert SETTING.fp32_precision == ("bf16" if units else before)
        raise KeyError
    assert SETTING.fp32_precision == before
    with bf16_products(False):
        assert SETTING.fp32_precision == before


def test_the_other_settings_of_torch_can_be_used_afterwards(units):
    with bf16_products(True):
        pass
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("limit, allowed", [("AVX512_CORE", False), ("avx2", False), ("ALL", True)])
def test_a_limit_of_onednn(limit, allowed, monkeypatch):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert module._can_use_them() is allowed
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: False)
    assert not module._can_use_them()


def test_the_cpu_is_asked():
    assert cpu_has_bf16() in (True, False)


# ---- Where ----


def used(monkeypatch, where, name, call):
    """The setting while an operator of the core runs."""
    seen = []
    inner = getattr(where, name)

    def watched(*args, **kwargs):
        seen.append(SETTING.fp32_precision)
        return inner(*args, **kwargs)

    monkeypatch.setattr(where, name, watched)
    call()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_functions_use_them_for_bfloat16(dtype, units, monkeypatch):
    from oddsmith import _core

    hidden, weight = torch.randn(4, 8, dtype=dtype), torch.randn(30, 8, dtype=dtype)
    targets = torch.tensor([3, 4, 5, 6])
    expected = ["bf16"] if units and dtype == torch.bfloat16 else [SETTING.fp32_precision]
    pair = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    calls = {
        "linear_logps": lambda: linear_logps(hidden, weight, targets),
        "linear_orpo": lambda: linear_orpo(hidden, weight, targets, *pair, 0.1),
    }
    for name, call in calls.items():
        assert used(monkeypatch, _core, name, call) == expected


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_head_of_a_model_does_what_autocast_would(autocast, units, monkeypatch):
    model = make_model("mistral", make_tokenizer())
    ids = torch.randint(3, 40, (2, 7))
    batch = FusedBatch.build(ids, torch.ones_like(ids), ids, beta=0.3, nll_scope="full",
                             odds_ratio_link="logsigmoid", logits_budget=None)  # fmt: skip
    model_head.check(model)

    def call():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            fused_loss(model, batch, ids, use_cache=False).loss.backward()

    before = SETTING.fp32_precision
    seen = used(monkeypatch, model_head, "linear_orpo", call)
    assert seen == ["bf16" if units and autocast == torch.bfloat16 else before]
    assert model.lm_head.weight.grad.dtype == torch.float32


# ---- How far ----


@pytest.mark.parametrize("trained", [True, False])
def test_as_near_to_the_truth_as_a_bfloat16_head(trained):
    """fp64 is the truth, logits of bfloat16 as in TRL under autocast the peer."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(48, 96), 0.3 * torch.randn(500, 96)
    targets, sequence = torch.randint(0, 500, (48,)), torch.arange(4).repeat_interleave(12)
    rows = targets, sequence, torch.ones(48, dtype=torch.bool)

    def ours(dtype, products):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        w.requires_grad_(trained)
        with bf16_products(products):
            out = linear_orpo(h, w, *rows, 0.4)
        out.loss.backward()
        return [out.loss.detach(), h.grad, *([w.grad] if trained else [])]

    def naive():
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        logits = (h.bfloat16() @ w.bfloat16().T).float()
        logps = logits.log_softmax(-1)[torch.arange(48), targets].view(4, 12)
        means = logps.mean(1)
        chosen, rejected = means[:2], means[2:]
        odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        loss = -logps[:2].mean() - 0.4 * torch.nn.functional.logsigmoid(odds).mean()
        loss.backward()
        return [loss.detach(), h.grad, *([w.grad] if trained else [])]

    truth = ours(torch.float64, False)
    for mine, theirs, true in zip(ours(torch.float32, True), naive(), truth, strict=True):
        own, peer = ((x.double() - true).norm().item() for x in (mine, theirs))
        assert own <= 1.1 * peer + 1e-6
        assert own <= 0.02 * true.norm().item()
