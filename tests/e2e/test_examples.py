"""Every file of examples/ runs, for two steps, on a tiny local model."""

import json
import subprocess
import sys

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oddsmith import cli
from support.paths import EXAMPLES

# PEFT reads a name that transformers 5.2x deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_no_example_is_forgotten():
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == [
        "common.py",  # what the scripts share
        "orpo_galore.py",
        "orpo_lora.py",
        "orpo_qlora.py",  # in test_qlora.py
        "orpo_quickstart.ipynb",  # in test_notebook.py
        "train.yaml",
    ]


def test_orpo_galore(tiny_mistral, ultrafeedback, tmp_path):
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, EXAMPLES / "orpo_galore.py", "--model", tiny_mistral,
         "--dataset", ultrafeedback, "--output-dir", out, "--max-steps", "2",
         "--eval-steps", "2", "--save-steps", "2", "--logging-steps", "1", "--rank", "8",
         "--learning-rate", "1e-3", "--max-length", "96", "--max-prompt-length", "64"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    # The reason that batches are not packed would be a warning.
    assert "keep their padding" not in run.stderr and "from logits" not in run.stderr
    assert f"Saved the model to {out}" in run.stdout
    trained = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    base = AutoModelForCausalLM.from_pretrained(tiny_mistral)
    assert all(not trained[name].equal(weight) for name, weight in base.named_parameters())
    assert (out / "checkpoint-2" / "optimizer.pt").is_file()


def test_orpo_lora(tiny_mistral, ultrafeedback, tmp_path):
    pytest.importorskip("tensorboard", reason="an extra: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, EXAMPLES / "orpo_lora.py", "--model", tiny_mistral,
         "--dataset", ultrafeedback, "--output-dir", out, "--max-steps", "2",
         "--eval-steps", "2", "--save-steps", "2", "--logging-steps", "1",
         "--learning-rate", "1e-3", "--max-length", "96", "--max-prompt-length", "64",
         "--report-to", "tensorboard"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    # The reason that batches are not packed would be a warning.
    assert "keep their padding" not in run.stderr and "from logits" not in run.stderr
    assert f"Saved the adapter to {out}" in run.stdout
    # The start-up check would report this if the prompt were there twice.
    assert "have the prompt twice" not in run.stderr

    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 16)
    assert len(adapter["target_modules"]) == 7
    base = AutoModelForCausalLM.from_pretrained(tiny_mistral)
    model = PeftModel.from_pretrained(base, out)
    assert any(
        weight.abs().max() > 0 for name, weight in model.named_parameters() if "lora_B" in name
    )
    assert (out / "checkpoint-2").is_dir()

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert {"train/loss", "train/rewards/margins", "eval/rewards/accuracies"} <= set(tags)
    assert [event.step for event in accumulator.Scalars("train/rewards/margins")] == [1, 2]


def test_the_settings_file(tiny_mistral, ultrafeedback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["--model", tiny_mistral, "--dataset", ultrafeedback, "--max_steps", 2,
                 "--eval_steps", 2, "--max_length", 96, "--max_prompt_length", 64,
                 "--use_cpu"]  # fmt: skip
    assert cli.main(["train", str(EXAMPLES / "train.yaml"), *map(str, overrides)]) == 0
    out = tmp_path / "orpo_lora"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 16
    assert "eval_rewards/accuracies" in json.loads((out / "eval_results.json").read_text())
