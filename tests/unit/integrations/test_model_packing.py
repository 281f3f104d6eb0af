"""Which models can be packed, and for which rows; in any dtype, with adapters, without weights."""

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from oddsmith.integrations import model_packing
from oddsmith.integrations.head_probe import HeadMismatch, LogitMap, probe_head
from oddsmith.integrations.model_packing import CannotPack, RowLimits, check
from oddsmith.nn import Linear4bit
from oddsmith.packing.batch import PackedBatch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DTYPES = [torch.float32, torch.bfloat16]


def tiny(family, kind=None, **options):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    kind = kind or getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    return kind(config)


def windowed(family, window, **options):
    layers = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": window}
    return tiny(family, **layers, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["Llama", "Mixtral", "OPT", "Gemma3Text", "Ministral3"])
def test_models_that_pack(family, dtype):
    assert check(tiny(family).to(dtype)) == RowLimits()


HYBRIDS = {
    "Jamba": {"num_experts": 2},
    "FalconH1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "Qwen3Next": {"num_experts": 4, "head_dim": 16},
    "Qwen3_5Text": {"head_dim": 16},
    "RecurrentGemma": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_are_refused_in_any_dtype(family, dtype):
    with pytest.raises(CannotPack, match="recurrence or convolution"):
        check(tiny(family, **HYBRIDS[family]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_class_that_drops_the_row_is_refused_in_any_dtype(dtype):
    model = tiny("Falcon", new_decoder_architecture=True, alibi=False)
    with pytest.raises(CannotPack, match="does not get the packed row"):
        check(model.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_are_no_limit_whether_the_attention_or_its_mask_is_told(dtype):
    # Far longer than a trial, so that only scaled windows show it.
    model = windowed("Qwen2Moe", 500, num_experts=4, moe_intermediate_size=16).to(dtype)
    assert check(model) == RowLimits()
    assert check(windowed("Qwen2", 500).to(dtype)) == RowLimits()


def test_a_window_that_flash_attention_is_not_told_limits_the_sequences():
    # transformers gives its flash attention no mask, and this model gives it no window.
    model = windowed("Qwen2Moe", 500, num_experts=4, moe_intermediate_size=16)
    model.config._attn_implementation = "flash_attention_2"
    assert check(model) == RowLimits(sequence=500)


def test_temperatures_limit_rows_and_chunks_nothing():
    options = {"num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 32}
    model = tiny("Llama4Text", attention_chunk_size=300, floor_scale=900, head_dim=16, **options)
    assert check(model) == RowLimits(row=899)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_pack_under_every_name_without_its_package(name, dtype):
    model = tiny("Mistral", sliding_window=500).to(dtype)
    model.config._attn_implementation = name
    assert check(model) == RowLimits()
    assert model.config._attn_implementation == name


def test_a_name_that_is_not_known():
    model = tiny("Mistral")
    model.config._attn_implementation_internal = "mine"
    with pytest.raises(CannotPack, match="'mine', which transformers does not have"):
        check(model)


def test_the_auxiliary_loss_is_tried_out(monkeypatch):
    module = transformers.models.mixtral.modeling_mixtral
    model = tiny("Mixtral", output_router_logits=True)
    assert check(model) == RowLimits()
    theirs = module.load_balancing_loss_func
    # As if it counted padding.
    monkeypatch.setattr(
        module, "load_balancing_loss_func", lambda logits, count, k, mask: theirs(logits, count, k)
    )
    with pytest.raises(CannotPack, match="its auxiliary loss on a packed row differs"):
        check(model)


def test_limits():
    pairs = [
        {
            "chosen_input_ids": [3] * 9,
            "chosen_labels": [-100] * 4 + [3] * 5,
            "rejected_input_ids": [3] * 6,
            "rejected_labels": [-100] * 4 + [3] * 2,
        }
    ]
    batch = PackedBatch.build(pairs, share_prompt=True)  # 3 shared, 6 and 3
    assert RowLimits().allow(batch) and RowLimits(9, 12).allow(batch)
    assert not RowLimits(8).allow(batch) and not RowLimits(None, 11).allow(batch)
    assert (
        str(RowLimits(1024, 9)) == "sequences of up to 1,024 tokens and batches of up to 9 tokens"
    )
    assert str(RowLimits()) == ""


def test_a_mixed_model_of_4_bits_packs():
    """Products in bfloat16 with a head in float32, which prepare_model_for_kbit_training leaves."""
    model = tiny("Mistral")
    for layer in model.model.layers:
        for part in (layer.mlp, layer.self_attn):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear) and min(linear.weight.shape) == 64:
                    four = Linear4bit.from_linear(linear, compute_dtype=torch.bfloat16)
                    setattr(part, name, four)
    assert check(model) == RowLimits()


def test_the_model_itself_is_not_run():
    model, runs = tiny("Llama"), []
    register = nn.modules.module.register_module_forward_pre_hook
    handle = register(lambda module, args: runs.append(module))
    try:
        check(model)
    finally:
        handle.remove()
    assert runs and not set(runs) & set(model.modules())
    with torch.device("meta"):
        model = tiny("Llama")
    assert check(model) == RowLimits()


@pytest.fixture
def sharded():
    """A model that FSDP2 has split, over one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh, model = init_device_mesh("cpu", (1,)), tiny("Llama")
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    yield model
    dist.destroy_process_group()


def test_a_sharded_model_stays_as_it_was(sharded):
    def state():
        return {
            name: (type(p), id(p), p.to_local().data_ptr(), p._version)
            for name, p in sharded.named_parameters()
        }

    before, runs = state(), []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, args: runs.append(m))
    try:
        assert probe_head(sharded) == LogitMap()
        assert check(sharded) == RowLimits()
    finally:
        handle.remove()
    assert state() == before
    assert runs and not set(runs) & set(sharded.modules())
    sharded.model.layers[1].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(HeadMismatch, match="weights are sharded, and model.layers.1 has a hook"):
        probe_head(sharded)


class Pooled(nn.Module):
    """The mean of the row so far, whatever sequence it is of."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_somebody_has_changed_is_tried_on_the_model_itself(dtype):
    model = tiny("Llama", initializer_range=0.2).to(dtype)
    model.model.layers[1].mlp = Pooled()
    with pytest.raises(CannotPack, match="change with the tokens of another"):
        check(model)
    model = tiny("Llama", initializer_range=0.2).to(dtype)
    model.model.layers[1].register_forward_hook(lambda module, args, out: 2 * out)
    assert check(model) == RowLimits()
    with torch.device("meta"):
        model = tiny("Llama")
    model.model.layers[1].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(CannotPack, match="layers.1 has a hook, and its weights are not in memory"):
        check(model)


class Needy(LlamaForCausalLM):
    """Its class cannot be built from a configuration alone."""

    def __init__(self, config, more):
        super().__init__(config)


def needy(**options):
    torch.manual_seed(0)
    return Needy(LlamaConfig(**{**SIZES, **options}), 1)


def test_without_a_small_model_the_model_itself_decides_or_none():
    assert check(needy(initializer_range=0.2)) == RowLimits()
    with pytest.raises(CannotPack, match="in less than float32 it proves nothing"):
        check(needy().bfloat16())
    with pytest.raises(CannotPack, match="hardly depend on the tokens"):
        check(needy(initializer_range=1e-4))
    reason = r"not in memory, and a small model of its class cannot be built \(TypeError"
    with torch.device("meta"), pytest.raises(CannotPack, match=reason):
        check(needy())


def test_without_a_small_model_windows_are_not_trusted():
    class NeedyMistral(transformers.MistralForCausalLM):
        def __init__(self, config, more):
            super().__init__(config)

    sizes = {**SIZES, "initializer_range": 0.2, "sliding_window": 500}
    model = NeedyMistral(transformers.MistralConfig(**sizes), 1)
    with pytest.raises(CannotPack, match="longer than a trial"):
        check(model)


def test_a_table_that_has_changed(monkeypatch):
    def refuse(segments):
        raise CannotPack("transformers' table of attention functions has changed")

    monkeypatch.setattr(model_packing, "PackedRow", refuse)
    with pytest.raises(CannotPack, match="table of attention functions"):
        check(tiny("Llama"))
