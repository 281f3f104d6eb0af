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
from support.engine_differences import unsaved
from support.engine_launch import problems, run_cells
from support.engine_runs import FEATURES, STEPS, make_trainer
from support.engine_table import DEEPSPEED, NOT_GATHERED
from support.engines import Engine
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


def check_a_step_without_gradients(models: str, folder: Path) -> None:
    """ZeRO of each stage ends as one process does, and saves nothing."""
    for stage in (1, 2, 3):
        trainer = make_trainer(Engine(zero(stage)), FEATURES["LoRA"], Path(models), folder)
        body = trainer.model.get_base_model().model
        body.register_forward_hook(lambda module, args, out: cut(out))
        with pytest.raises(RuntimeError, match="gradients of the first step are all zero"):
            trainer.train()
        assert trainer.state.global_step == 0
        assert not list(folder.glob("checkpoint-*"))
        end_deepspeed()


def cut(out):
    """A model's output whose gradient ends here."""
    hidden = out.last_hidden_state
    out.last_hidden_state = hidden.detach() + 0.0 * hidden
    return out


def main(models: str, folder: str) -> None:
    allow_cpus()
    for name, row in DEEPSPEED.items():
        run_cells(row, models, Path(folder) / name, after=end_deepspeed)
    check_small_model()
    check_a_step_without_gradients(models, Path(folder) / "without")


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


def test_checkpoints_in_parts(launch):
    """DeepSpeed's own script joins them; an adapter is whole beside them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = launch / NOT_GATHERED
    found = torch.load(folder / "full" / "result.pt")
    checkpoint = folder / "full" / f"checkpoint-{STEPS}"
    assert not list(checkpoint.glob("*.safetensors"))
    joined = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    for name, weight in found["weights"].items():
        assert torch.equal(joined[name], weight), name
    for cell in ("LoRA", "NF4 + LoRA"):
        found = torch.load(folder / cell / "result.pt")
        assert not list(unsaved(folder / cell / f"checkpoint-{STEPS}", found)), cell


if __name__ == "__main__":
    main(*sys.argv[1:])
    end()
