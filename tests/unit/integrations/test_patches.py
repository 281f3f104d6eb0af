"""Every change to another library: applied, undone, counted, and skipped if it does not fit."""

import inspect
import logging
import re
import sys

import datasets
import peft.tuners.lora.model as peft_model
import peft.tuners.tuners_utils as peft_tuners
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.quantizers import auto

import oddsmith
from oddsmith import _core
from oddsmith.integrations import patch as patch_module
from oddsmith.integrations.attention_table import TABLE as ATTENTION
from oddsmith.integrations.attention_table import AttentionTable, PackedRow
from oddsmith.integrations.bitsandbytes_layers import AdoptedLayers, KeptLayout
from oddsmith.integrations.checkpointing import Checkpointing
from oddsmith.integrations.cpu_memory import POOL, CpuMemoryPool
from oddsmith.integrations.dropout import NoDropout
from oddsmith.integrations.import_hook import HOOK, ImportHook
from oddsmith.integrations.kept_layers import KeptLayers
from oddsmith.integrations.module_forward import ModuleForward
from oddsmith.integrations.packed_masks import CannotPack
from oddsmith.integrations.parameter_count import COUNT, ParameterCount
from oddsmith.integrations.patch import Patch, Unsupported, find
from oddsmith.integrations.patches import PATCHES
from oddsmith.integrations.peft_dispatch import DISPATCH, LoraDispatch
from oddsmith.integrations.peft_merge import MERGING, AdapterMerging
from oddsmith.integrations.progress_bars import NoProgressBars
from oddsmith.integrations.quantizer_table import (
    MERGE,
    METHOD,
    TABLE,
    QuantizerMerge,
    QuantizerTable,
)
from support.models import checkpointed
from support.paths import ROOT
from support.trainer_runs import make_model, make_tokenizer

SHARED = (HOOK, TABLE, MERGE, COUNT, ATTENTION, DISPATCH, MERGING, POOL)


@pytest.fixture(autouse=True)
def only_ours(monkeypatch):
    """Each test begins without any patch, and leaves those that were there."""
    users = {each: each._users for each in SHARED}
    for each in SHARED:
        while each.is_applied():
            each.undo()
    monkeypatch.setattr(patch_module, "_said", set())
    yield
    monkeypatch.undo()
    for each, count in users.items():
        while each.is_applied():
            each.undo()
        for _ in range(count):
            each.apply()


# ---- The table ----


def dropout_model():
    layer = nn.Module()
    layer.attention_dropout, layer.inner, layer.off = 0.1, nn.Dropout(0.2), nn.Dropout(0.0)
    return layer


def adoptable_model():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    return nn.Sequential(layer).to("cpu")


def checkpointed_model():
    return checkpointed(make_model("mistral", make_tokenizer()))


def attention_state():
    tables = dict(AttentionInterface()), dict(AttentionMaskInterface())
    return *tables, AttentionInterface.get_interface


def attributes_of_modules(model):
    hidden = ("_modules", "_parameters", "_buffers")
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if k not in hidden})
        for name, module in model.named_modules()
    ]


def pool_case(monkeypatch):
    state = []
    install, uninstall = _core.install_pool, _core.uninstall_pool
    monkeypatch.setattr(_core, "install_pool", lambda: (state.append("pool"), install()))
    monkeypatch.setattr(_core, "uninstall_pool", lambda: (state.remove("pool"), uninstall()))
    return lambda: POOL, lambda: list(state)


def module_case(kind, model, *more):
    def state():
        # Values, and for hooks which ones: a dictionary that is the same object would always be equal.
        return [
            (n, t, repr(sorted(v.items(), key=str))) for n, t, v in attributes_of_modules(model)
        ]

    return lambda: kind(model, *more), state


def shared_case(patch, state):
    return lambda: patch, state


CASES = {
    ImportHook: lambda _: shared_case(HOOK, lambda: list(sys.meta_path)),
    QuantizerTable: lambda _: shared_case(TABLE, lambda: dict(auto.AUTO_QUANTIZER_MAPPING)),
    QuantizerMerge: lambda _: shared_case(MERGE, lambda: dict(vars(auto.AutoHfQuantizer))),
    ParameterCount: lambda _: shared_case(COUNT, lambda: dict(vars(PreTrainedModel))),
    AttentionTable: lambda _: shared_case(ATTENTION, attention_state),
    LoraDispatch: lambda _: shared_case(DISPATCH, lambda: dict(vars(peft_model))),
    AdapterMerging: lambda _: shared_case(MERGING, lambda: dict(vars(peft_tuners.BaseTuner))),
    ModuleForward: lambda _: module_case(ModuleForward, nn.Linear(2, 2), lambda x: x),
    NoDropout: lambda _: module_case(NoDropout, dropout_model()),
    Checkpointing: lambda _: module_case(Checkpointing, make_model("mistral", make_tokenizer())),
    KeptLayers: lambda _: module_case(KeptLayers, checkpointed_model(), lambda tokens: 0.0),
    AdoptedLayers: lambda _: module_case(AdoptedLayers, adoptable_model()),
    KeptLayout: lambda _: module_case(KeptLayout, adoptable_model()),
    CpuMemoryPool: pool_case,
    NoProgressBars: lambda _: (
        NoProgressBars,
        lambda: (
            datasets.are_progress_bars_disabled(),
            transformers.utils.logging.is_progress_bar_enabled(),
        ),
    ),
}


def test_the_list_is_whole():
    def below(kind):
        return {each for sub in kind.__subclasses__() for each in (sub, *below(sub))}

    ours = {each for each in below(Patch) if each.__module__.startswith("oddsmith.")}
    assert ours == set(PATCHES) == set(CASES)
    assert len(PATCHES) == len(set(PATCHES))
    for kind in PATCHES:
        for line in (kind.target, kind.purpose, kind.tested, kind.fallback):
            assert len(line) > 8
        assert re.search(r"\d\.\d", kind.tested)
        assert not kind.fallback.endswith(".")


def test_the_documentation_lists_them():
    text = (ROOT / "docs" / "patches.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n\n((?:- .*\n)+)", text, re.MULTILINE))
    for kind in PATCHES:
        assert sections.pop(kind.__name__).splitlines() == [
            f"- Changes: {kind.target}",
            f"- Why: {kind.purpose}",
            f"- Tested with: {kind.tested}",
            f"- Else: {kind.fallback}.",
        ]
    assert not sections


@pytest.mark.parametrize("kind", PATCHES, ids=lambda kind: kind.__name__)
class TestEachPatch:
    def test_applying_and_undoing(self, kind, monkeypatch):
        make, state = CASES[kind](monkeypatch)
        before = state()
        patch = make()
        assert not patch.is_applied() and state() == before
        assert patch.apply() and patch.is_applied()
        assert state() != before
        patch.undo()
        assert not patch.is_applied() and state() == before
        # And once more.
        assert patch.apply() and state() != before
        patch.undo()
        assert state() == before

    def test_undo_without_apply(self, kind, monkeypatch):
        make, state = CASES[kind](monkeypatch)
        before, patch = state(), make()
        patch.undo()
        patch.undo()
        assert state() == before and not patch.is_applied()
        assert patch.apply()
        patch.undo()
        assert state() == before

    def test_nested_users(self, kind, monkeypatch):
        make, state = CASES[kind](monkeypatch)
        before, patch = state(), make()
        with patch:
            within = state()
            with patch:
                assert state() == within
            assert patch.is_applied() and state() == within
            assert patch.ensure() and state() == within
        assert state() == before and not patch.is_applied()

    def test_after_an_error(self, kind, monkeypatch):
        make, state = CASES[kind](monkeypatch)
        before = state()
        with pytest.raises(ZeroDivisionError), make():
            1 / 0  # noqa: B018
        assert state() == before

    def test_a_failed_change_leaves_a_line_and_nothing_else(self, kind, monkeypatch, caplog):
        make, state = CASES[kind](monkeypatch)
        before, patch = state(), make()

        def fail():
            raise Unsupported("it is another one")

        monkeypatch.setattr(patch, "_try_out", fail)
        assert not patch.apply() and not patch.ensure() and not patch.is_applied()
        assert state() == before
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        (line,) = caplog.messages
        assert line == f"{kind.target} is not changed (it is another one): {kind.fallback}."


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in PATCHES for name in kind.needs],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_name_that_is_gone(kind, name, monkeypatch, caplog):
    make, state = CASES[kind](monkeypatch)
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    module, _, path = name.partition(":")
    owner = find(f"{module}:{path.rpartition('.')[0]}") if "." in path else sys.modules[module]
    for each in getattr(owner, "__mro__", [owner]):  # inherited ones too
        if attribute in vars(each):
            monkeypatch.delattr(each, attribute)
    patch = make()
    assert not patch.apply() and not patch.apply()
    assert not patch.is_applied()
    patch.undo()
    (line,) = caplog.messages
    assert f"{name.replace(':', '.')} does not exist" in line and kind.fallback in line
    monkeypatch.undo()
    before = state()
    assert patch.apply() and state() != before
    patch.undo()
    assert state() == before


# ---- Names that exist with another meaning ----


def counts_otherwise(self, trainable=False):
    return 0


def fake_table(monkeypatch):
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", {"other": object})


def fake_table_kind(monkeypatch):
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", {METHOD: "a name, to be imported later"})


def fake_merge(monkeypatch):
    monkeypatch.setattr(auto.AutoHfQuantizer, "merge_quantization_configs", staticmethod(id))


def fake_count(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "num_parameters", counts_otherwise)


def fake_attention(monkeypatch):
    for name in AttentionInterface():
        monkeypatch.setitem(AttentionInterface._global_mapping, name, lambda *_: None)


def fake_register(monkeypatch):
    monkeypatch.setattr(AttentionInterface, "register", staticmethod(lambda key, value: None))


def fake_pool(monkeypatch):
    def install():
        raise RuntimeError("the allocator of torch is another one")

    monkeypatch.setattr(_core, "install_pool", install)


def remove_register(monkeypatch):
    monkeypatch.delattr(transformers.utils.generic.GeneralInterface, "register")


def fake_dispatchers(monkeypatch):
    """As if peft asked somebody else for its layers."""
    theirs = peft_model.dispatch_default
    make = peft_model.LoraModel._create_new_module

    def create(lora_config, adapter_name, target, **kwargs):
        ours, peft_model.dispatch_default = peft_model.dispatch_default, theirs
        try:
            return make(lora_config, adapter_name, target, **kwargs)
        finally:
            peft_model.dispatch_default = ours

    monkeypatch.setattr(peft_model.LoraModel, "_create_new_module", staticmethod(create))


def fake_product(monkeypatch):
    from oddsmith.integrations.peft_lora import LoraLinear4bit

    forward = LoraLinear4bit.forward
    monkeypatch.setattr(LoraLinear4bit, "forward", lambda self, x: forward(self, x) * 1.5)


def fake_merge_adapter(monkeypatch):
    monkeypatch.setattr(peft_tuners.BaseTuner, "merge_adapter", lambda self: None)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (QuantizerTable, fake_table, f"it has no '{METHOD}'"),
        (QuantizerTable, fake_table_kind, f"it has no '{METHOD}'"),
        (QuantizerMerge, fake_merge, "it is not a class method"),
        (ParameterCount, fake_count, "it has no argument only_trainable, exclude_embeddings"),
        (AttentionTable, fake_attention, "another library has registered its own functions"),
        (AttentionTable, fake_register, "the registered function is not the one that is called"),
        (AttentionTable, remove_register, "TypeError: "),
        (CpuMemoryPool, fake_pool, "RuntimeError: the allocator of torch is another one"),
        (LoraDispatch, fake_dispatchers, "peft made a Linear"),
        (LoraDispatch, fake_product, "an adapter on a 4-bit layer gave another result"),
        (AdapterMerging, fake_merge_adapter, "a merged adapter gave another weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_name_that_means_something_else(kind, change, reason, monkeypatch, caplog):
    make, state = CASES[kind](monkeypatch)
    change(monkeypatch)
    before, patch = state(), make()
    assert not patch.apply() and not patch.apply()
    assert state() == before
    (line,) = caplog.messages
    assert f"({reason}" in line and kind.fallback in line


def test_a_block_without_the_change_undoes_nothing(monkeypatch):
    model = dropout_model()
    patch = NoDropout(model)
    with monkeypatch.context() as broken:
        broken.setattr(patch, "_check", lambda: 1 / 0)
        block = patch.__enter__()
    assert not block and patch.apply()
    patch.__exit__(None, None, None)
    assert patch.is_applied() and model.inner.p == 0.0
    patch.undo()
    assert model.inner.p == 0.2


def test_a_later_change_of_another_library_stays():
    def theirs(*args, **kwargs):
        return None

    real = AttentionInterface()["sdpa"]
    ATTENTION.apply()
    AttentionInterface.register("sdpa", theirs)
    ATTENTION.undo()
    assert AttentionInterface()["sdpa"] is theirs
    AttentionInterface.register("sdpa", real)


def test_a_forward_that_was_wrapped_meanwhile_ends_in_the_modules_own():
    layer = nn.Linear(2, 2)
    patch = ModuleForward(layer, lambda x: x * 100)
    patch.apply()
    ours = layer.forward
    layer.forward = lambda x: ours(x) + 1
    x = torch.ones(1, 2)
    assert torch.equal(layer(x), x * 100 + 1)
    patch.undo()
    torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x) + 1)


def test_two_runs_of_one_model_end_in_any_order():
    for first in (0, 1):
        model = dropout_model()
        runs = [NoDropout(model), NoDropout(model)]
        assert all(run.apply() for run in runs)
        runs[first].undo()
        assert (model.attention_dropout, model.inner.p) == (0.0, 0.0)
        runs[1 - first].undo()
        assert (model.attention_dropout, model.inner.p) == (0.1, 0.2)


def test_the_attention_is_registered_while_there_is_a_packed_row():
    before = AttentionInterface()["sdpa"]
    rows = [PackedRow(((1, 1, 1),)) for _ in range(2)]
    assert AttentionInterface()["sdpa"] is not before
    rows.pop()
    assert ATTENTION.is_applied()
    rows.pop()
    assert AttentionInterface()["sdpa"] is before and not ATTENTION.is_applied()


def test_no_packed_row_without_the_attention(monkeypatch):
    fake_attention(monkeypatch)
    with pytest.raises(CannotPack, match="table of attention functions"):
        PackedRow(((1, 1, 1),))


def test_a_reloaded_table_is_changed_again():
    TABLE.apply()
    assert TABLE.is_applied()
    old, auto.AUTO_QUANTIZER_MAPPING = auto.AUTO_QUANTIZER_MAPPING, {METHOD: id}
    try:
        assert not TABLE.is_applied()
        assert TABLE.ensure() and auto.AUTO_QUANTIZER_MAPPING[METHOD] is not id
        TABLE.undo()
        assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is id
    finally:
        auto.AUTO_QUANTIZER_MAPPING = old
        old[METHOD] = auto.Bnb4BitHfQuantizer


def test_the_configuration_is_only_read():
    """Loading with a configuration of ours leaves the class as it is."""
    before = dict(vars(BitsAndBytesConfig))
    oddsmith.NF4Config()
    assert dict(vars(BitsAndBytesConfig)) == before
    assert inspect.signature(BitsAndBytesConfig.__init__).parameters["bnb_4bit_quant_type"]
