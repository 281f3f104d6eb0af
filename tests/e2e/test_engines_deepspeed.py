"""DeepSpeed's ZeRO with every feature: as one process, or refused. `make engines` installs DeepSpeed.

Two processes run all cells of an engine one after the other; run as a script this file is what they
run.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support.deepspeed_on_cpu import allow_cpus, end_deepspeed, zero
from support.engine_cells import IN_32_BITS, differences
from support.engine_launch import result_of, run_cells
from support.engine_runs import FEATURES
from support.engines import Engine
from support.processes import end, two_processes

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# DeepSpeed makes one flat tensor of many parameters, whose blocks of 8-bit moments are others.
CELLS = [*FEATURES, *IN_32_BITS]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# As `accelerate launch` sets them.
ENVIRONMENT = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}
# Name -> how a run is spread, and the cells that run.
ENGINES = {
    "ZeRO-1": (Engine(zero(1)), ["adamw_8bit", "adamw_8bit in 32 bits"]),
    "ZeRO-2": (Engine(zero(2)), CELLS),
    "ZeRO-2 with offload": (Engine(zero(2, **OFFLOAD)), ["adamw_8bit", "adamw_8bit in 32 bits"]),
    "ZeRO-2 by environment": (
        Engine({"use_cpu": False}, ENVIRONMENT),
        ["full", "adamw_8bit in 32 bits", "galore_adamw"],
    ),
    "ZeRO-3": (Engine(zero(3)), CELLS),
}
REFUSED = {
    "galore_adamw": "ValueError: optim is 'galore_adamw' with DeepSpeed ZeRO-",
}


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
    for name, (engine, cells) in ENGINES.items():
        run_cells(engine, cells, models, Path(folder) / name, after=end_deepspeed)
    check_small_model()


# ---- Two processes against one ----


@pytest.fixture(scope="module")
def launch(engine_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two_processes(__file__, engine_models, folder, timeout=1800)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("engine", "cell"), [(name, cell) for name, (_, cells) in ENGINES.items() for cell in cells]
)
def test_a_feature(engine, cell, launch, alone):
    found = result_of(launch / engine, cell)
    if cell in REFUSED:
        assert REFUSED[cell] in found.get("error", "it ran")
        return
    assert not list(differences(engine, found, alone(cell)))
    saved = {each.name for each in (launch / engine / cell / "saved").iterdir()}
    assert saved & {"model.safetensors", "adapter_model.safetensors"}


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
