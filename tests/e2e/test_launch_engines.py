"""`oddsmith train --accelerate_config NAME` with the files of the package: two processes end as one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import support
from oddsmith import cli
from support.generated_pairs import string_rows
from support.processes import one_core, one_thread

STEPS = 4
ZERO = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
# Name -> what only this engine writes into a checkpoint.
ENGINES = {
    "fsdp2": "optimizer.bin",
    "zero2": "zero_to_fp32.py",
    "zero3": "zero_to_fp32.py",
}


def words(model, data, out, *more):
    return [
        "--model", model, "--dataset", data, "--output_dir", out, "--max_steps", STEPS,
        "--per_device_train_batch_size", 1, "--learning_rate", "1e-2", "--adam_epsilon", "1e-6",
        "--lr_scheduler_type", "linear", "--max_length", 96, "--logging_steps", 1, "--bf16", "false",
        "--save_steps", 2, "--disable_tqdm", "true", *more,
    ]  # fmt: skip


def launched(name, *arguments):
    environment = one_core()
    on_cpus = Path(support.__file__).parent / "on_cpus"
    environment["PYTHONPATH"] = os.pathsep.join([str(on_cpus), environment["PYTHONPATH"]])
    command = ["train", *arguments, "--num_processes", 2, "--accelerate_config", name]
    if name == "fsdp2":  # DeepSpeed does not run with it
        command.append("--use_cpu")
    done = subprocess.run(
        [sys.executable, "-m", "oddsmith", *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Saved the model and its tokenizer to") == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "name", ["fsdp2", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO)]
)
def test_a_file_of_the_package(name, tiny_mistral, tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = string_rows(12, seed=3, implicit=False)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    launched(name, *words(tiny_mistral, data, tmp_path / "two", "--gradient_accumulation_steps", 1))
    assert list((tmp_path / "two" / "checkpoint-2").glob(ENGINES[name]))
    accumulated = ("--gradient_accumulation_steps", 2, "--use_cpu")
    with one_thread():
        one = ["train", *words(tiny_mistral, data, tmp_path / "one", *accumulated)]
        assert cli.main([*map(str, one)]) == 0
    found, expected, before = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "two", tmp_path / "one", tiny_mistral)
    )
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert (found[key] - weight).abs().max() < 1e-4, key
        assert not torch.equal(weight, before[key]), key
