"""DeepSpeed's ZeRO with every feature: as one process, or refused. `make engines` installs DeepSpeed.

Two processes run all cells of an engine one after the other; run as a script this file is what they
run.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support.deepspeed_on_cpu import allow_cpus, end_deepspeed
from support.engine_launch import problems, run_cells
from support.engine_table import DEEPSPEED
from support.processes import end, two_processes

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def check_small_model() -> None:
    """While DeepSpeed splits each new module, a small model is whole."""
    import deepspeed
    from transformers import MistralConfig, MistralForCausalLM

    from oddsmith.integrations.small_model import small_model

    config = MistralConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=99
    )
    core = MistralForCausalLM(config)
    with deepspeed.zero.Init():
        small = small_model(core)
        assert all(p.numel() and not hasattr(p, "ds_id") for p in small.parameters())
        assert hasattr(torch.nn.Linear(4, 4).weight, "ds_id")


def main(models: str, folder: str) -> None:
    allow_cpus()
    for name, row in DEEPSPEED.items():
        run_cells(row, models, Path(folder) / name, after=end_deepspeed)
    check_small_model()


# ---- Two processes against one ----


@pytest.fixture(scope="module")
def launch(engine_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, engine_models, folder, timeout=1800)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("engine", "cell"), [(name, cell) for name, row in DEEPSPEED.items() for cell in row.cells]
)
def test_a_feature(engine, cell, launch, alone):
    assert not problems(engine, DEEPSPEED[engine], cell, launch / engine, alone)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
