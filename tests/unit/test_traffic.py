"""The formulas of docs/distributed.md for weights and operations, against models. Their traffic is
counted in tests/e2e/test_traffic.py."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from support import traffic

TINY = MistralConfig(
    hidden_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
    intermediate_size=88, vocab_size=100, use_cache=False,
)  # fmt: skip
TOKENS = 16


def test_sizes_of_the_table():
    mistral = MistralConfig(vocab_size=32000)  # its defaults are those of Mistral 7B
    llama = LlamaConfig(
        hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80,
        intermediate_size=28672, vocab_size=128256,
    )  # fmt: skip
    for name, config in (("7B", mistral), ("70B", llama)):
        shape = traffic.shape_of(config)
        assert shape == traffic.MODELS[name]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 4])
def test_operations(rank, checkpointing):
    """All products but those of attention are `mm`."""
    model = AutoModelForCausalLM.from_config(TINY, attn_implementation="eager")
    if rank is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
        model.enable_input_require_grads()  # else the first layer has no gradients of its inputs
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(TOKENS)[None]).logits.sum().backward()
    found = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    shape = traffic.shape_of(TINY)
    expected = traffic.flops_per_token(shape, rank, checkpointing)
    if checkpointing:
        # torch stops once it has what the backward pass reads: not the last product of a layer, of the
        # weight down_proj or of its factor B.
        expected -= 2 * TINY.num_hidden_layers * (rank or TINY.intermediate_size) * 48
    assert found == TOKENS * expected
    if rank is not None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == shape.adapter(rank)


def test_a_ring():
    # 4 processes, 12 bytes: each sends 3 quarters of 12 to gather or scatter, and both to reduce.
    each = traffic.Traffic(reduced=12, gathered=12, scattered=12)
    assert each.sent(4) == 2 * 9 + 9 + 9
    assert each.sent(4, micro_batches=3) == 2 * 9 + 3 * 9 + 9
    # 36 bytes by a link of 9 bytes a second take 4 seconds.
    operations = traffic.SPEED / 100
    assert traffic.tokens_at_limit(each, operations, 4, link=9) == pytest.approx(400)
