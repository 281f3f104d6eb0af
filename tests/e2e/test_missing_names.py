"""Another transformers and another peft: without what is private to them, training goes on."""

import subprocess
import sys

import pytest

from support.trainer_runs import make_model, make_tokenizer

# Names that are private to their libraries, or have moved before; what needs one falls back.
NAMES = [
    "transformers.core_model_loading:WeightConverter",
    "transformers.core_model_loading:WeightRenaming",
    "transformers.core_model_loading:ConversionOps",
    "transformers.core_model_loading:rename_source_key",
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.quantizers.auto:AUTO_QUANTIZER_MAPPING",
    "transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs",
    "transformers:PreTrainedModel.num_parameters",
    "transformers.quantizers.base:get_keys_to_not_convert",
    "transformers.quantizers.quantizers_utils:should_convert_module",
    "transformers.quantizers.quantizers_utils:get_module_from_name",
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer",
    "transformers.integrations.sdpa_attention:sdpa_attention_forward",
    "transformers.masking_utils:AttentionMaskInterface",
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS",
    "transformers.trainer_utils:check_target_module_exists",
    "peft.tuners.lora.model:dispatch_default",
    "peft.utils.other:get_pattern_key",
]

SCRIPT = """
import builtins, logging, sys
import oddsmith
from oddsmith.integrations import patch, quantizer_table

folder, out, *missing = sys.argv[1:]
real, found = builtins.__import__, patch.find

def without(name, globals=None, locals=None, fromlist=(), level=0):
    # Only what oddsmith imports: their own code goes on as it is.
    if (globals or {}).get("__name__", "").startswith("oddsmith") and level == 0:
        for each in fromlist or ():
            if f"{name}:{each}" in missing:
                raise ImportError(f"cannot import name {each!r} from {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)

def find(name):
    if name in missing:
        raise patch.Unsupported(f"{name.replace(':', '.')} does not exist")
    return found(name)

builtins.__import__, patch.find, quantizer_table.find = without, find, find
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("oddsmith.integrations").addHandler(Keep())
"""

RUNS = """
from oddsmith import NF4Config, ORPOConfig, ORPOTrainer
import peft
from transformers import AutoModelForCausalLM, AutoTokenizer
from support.trainer_runs import arguments, pairs
for adapter in (None, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")):
    for settings in ({}, {"quantization_config": NF4Config()}):
        if settings and adapter is None:
            continue
        trainer = ORPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, **settings),
            args=ORPOConfig(**arguments(out, max_steps=2)),
            train_dataset=pairs(8),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=adapter,
        )
        trainer.train()
        assert trainer._plain_because is None
        assert trainer._padded_because is not None
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 2 and all(0 < loss < 100 for loss in losses), losses
for line in sorted(set(lines)):
    print("LINE", line)
assert len(set(lines)) == len(lines), lines
"""

TOOLS = """
import io
from contextlib import redirect_stderr
from oddsmith import cli
for arguments in (["quantize", folder, out], ["merge", folder, folder, out]):
    said = io.StringIO()
    with redirect_stderr(said):
        assert cli.main(arguments) == 1
    (line,) = [each for each in said.getvalue().splitlines() if "oddsmith" in each]
    assert "needs a transformers and a peft that it was tested with" in line, line
"""


def run(script, folder, out, names):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script, str(folder), str(out), *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line[5:] for line in done.stdout.splitlines() if line.startswith("LINE ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    make_model("mistral", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_training_goes_on_without_any_of_them(folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the fall-back of 4-bit models")
    lines = run(RUNS, folder, tmp_path, NAMES)
    expected = (
        "bitsandbytes",  # the quantizer's table
        "use_for_bitsandbytes",  # NF4Config of a quantised checkpoint
        "batches go through models with their padding",
    )
    for words in expected:
        assert any(words in line for line in lines), (words, lines)
    assert all(len(line.splitlines()) == 1 for line in lines)


def test_tools_for_checkpoints_are_refused_in_a_sentence(folder, tmp_path):
    run(TOOLS, folder, tmp_path / "out", NAMES)
