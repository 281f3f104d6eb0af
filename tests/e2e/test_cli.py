"""`oddsmith train` from the command line to its output folder, on a tiny local model."""

import errno
import gzip
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from oddsmith import cli
from oddsmith.demo.tasks import make_pairs

# PEFT reads a name that transformers 5.2x deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

QUICK = [
    "--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
    "--learning_rate", "3e-3", "--beta", "0.3", "--max_length", "96", "--logging_steps", "1",
    "--use_cpu", "--bf16", "false", "--save_strategy", "no", "--disable_tqdm", "true",
]  # fmt: skip


def train(*argv):
    return cli.main(["train", *map(str, argv)])


def string_rows(count, seed):
    return [
        {
            "prompt": row["prompt"][0]["content"] + "\n",
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
        for row in make_pairs(count, seed)
    ]


def write_jsonl(path, rows):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def error_of(capsys, *argv):
    """The single line that a failed run prints, after its exit code 1 is checked."""
    assert train(*argv) == 1
    errors = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("oddsmith train: error: ")
    ]
    assert len(errors) == 1
    return errors[0]


def test_a_compressed_file_trains_all_weights(tiny_mistral, tmp_path, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl.gz", string_rows(16, seed=1))
    out = tmp_path / "out"
    assert train("--model", tiny_mistral, "--dataset", data, "--output_dir", out, *QUICK) == 0
    assert f"Saved the model and its tokenizer to {out}" in capsys.readouterr().out

    before = AutoModelForCausalLM.from_pretrained(tiny_mistral).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    # Every matrix changed, the head included: all are in the graph.
    assert all(
        not torch.equal(before[name], after[name]) for name in before if before[name].dim() == 2
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "rewards/margins" in entry] == [1, 2]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_settings_file_trains_an_adapter_on_ultrafeedback(
    tiny_mistral, ultrafeedback, tmp_path, caplog
):
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"""\
model: {tiny_mistral}
dataset: {ultrafeedback}
output_dir: {tmp_path / "out"}
use_peft: true
lora_r: 16
lora_alpha: 12
lora_target_modules: [q_proj, v_proj]
learning_rate: 1e-3
eval_strategy: steps
eval_steps: 2
"""
    )
    assert train(settings, *QUICK, "--lora_r", "4") == 0

    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 12)
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    evaluation = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0.0 <= evaluation["eval_rewards/accuracies"] <= 1.0
    # The base model has neither: both fallbacks are logged, and saved with the tokenizer.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt == "<s>[INST] Hi [/INST]"
    assert "has no chat template" in caplog.text


def test_a_chat_template_from_a_file(tiny_mistral, ultrafeedback, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    out = tmp_path / "out"
    assert train("--model", tiny_mistral, "--dataset", ultrafeedback, "--output_dir", out,
                 "--chat_template", template, *QUICK) == 0  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ) == ("<user>Hi<assistant>")


def test_a_run_resumes_from_its_newest_checkpoint(tiny_mistral, ultrafeedback, tmp_path, capsys):
    common = ["--model", tiny_mistral, "--dataset", ultrafeedback, *QUICK,
              "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4",
              "--lr_scheduler_type", "constant"]  # fmt: skip
    assert train(*common, "--output_dir", tmp_path / "straight") == 0
    resumed = [*common, "--output_dir", tmp_path / "resumed"]
    assert "has no checkpoint" in error_of(capsys, *resumed, "--resume_from_checkpoint", "true")
    assert train(*resumed, "--max_steps", "2") == 0
    assert train(*resumed, "--resume_from_checkpoint", "true") == 0
    straight = AutoModelForCausalLM.from_pretrained(tmp_path / "straight").state_dict()
    for name, weight in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "resumed").state_dict().items()
    ):
        torch.testing.assert_close(weight, straight[name], rtol=1e-5, atol=1e-6)


def test_missing_things_are_named(tiny_mistral, tmp_path, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl", string_rows(8, seed=1))
    out = ["--output_dir", tmp_path / "out", *QUICK]
    absent = tmp_path / "absent"
    assert f"--model {absent}: no such folder" in error_of(
        capsys, "--model", absent, "--dataset", data, *out
    )
    assert f"dataset {absent}.jsonl: no such file" in error_of(
        capsys, "--model", tiny_mistral, "--dataset", f"{absent}.jsonl", *out
    )
    assert "--eval_strategy needs rows" in error_of(
        capsys, "--model", tiny_mistral, "--dataset", data, *out, "--eval_strategy", "epoch"
    )
    assert "--chat_template: " in error_of(
        capsys, "--model", tiny_mistral, "--dataset", data, *out, "--chat_template", absent
    )
    assert f"{absent}: no such folder" in error_of(
        capsys, "--model", tiny_mistral, "--dataset", data, *out, "--resume_from_checkpoint", absent
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "a"}], "no column chosen and no column rejected; it has text"),
        ([{"prompt": "a", "chosen": "b"}], "no column rejected"),
        ([{"prompt": 3, "chosen": "b", "rejected": "c"}], "prompt is 3"),
        ([{"prompt": "a", "chosen": [1], "rejected": [2]}], "chosen is [1]"),
        ([{"prompt": "Long " * 90, "chosen": "b", "rejected": "c"}] * 2, "max_length"),
    ],
)
def test_wrong_rows_are_one_line(rows, reason, tiny_mistral, tmp_path, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    line = error_of(
        capsys, "--model", tiny_mistral, "--dataset", data, "--output_dir", tmp_path, *QUICK
    )
    assert reason in line


def test_the_module_runs_as_a_program(tmp_path):
    """What `oddsmith` and a launcher start: exit codes reach the shell, errors are one line."""
    run = subprocess.run(
        [sys.executable, "-m", "oddsmith", "train", "--model", "m", "--dataset",
         str(tmp_path / "none.jsonl"), "--output_dir", str(tmp_path), "--beta", "-1", "--use_cpu"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "beta is -1.0" in run.stderr


def test_reporting_to_what_is_not_installed(tiny_mistral, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "oddsmith.cli.train.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    data = write_jsonl(tmp_path / "pairs.jsonl", string_rows(4, seed=1))
    arguments = ["--model", tiny_mistral, "--dataset", data, "--output_dir", tmp_path / "out"]
    error = error_of(capsys, *arguments, "--report_to", "trackio", *QUICK)
    assert error.endswith("--report_to trackio: needs the package trackio, which is not installed")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--optim", "paged_adamw_8bit", "--optim_args", "page_dir=/none"),
            "page_dir is '/none'; must be",
        ),
        (
            (
                "--optim",
                "galore_adamw",
                "--optim_args",
                "rank=x",
                "--optim_target_modules",
                "all-linear",
            ),
            "rank",
        ),
        (
            ("--optim", "galore_adamw", "--optim_target_modules", "none", "such"),
            "--optim and its arguments: ",
        ),
        (("--optim", "adamw_8bit", "--optim_args", "optim_bits=7"), "optim_bits"),
    ],
)
def test_arguments_of_optimizers_are_one_line(flags, words, tiny_mistral, tmp_path, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl", string_rows(4, seed=1))
    argv = ("--model", tiny_mistral, "--dataset", data, "--output_dir", tmp_path / "out")
    assert words in error_of(capsys, *argv, *QUICK, *flags)


@pytest.mark.parametrize(
    ("where", "strategy", "left"),
    [
        ("_save_checkpoint", "steps", "There is none before it."),
        ("save_model", "no", "There is no checkpoint yet"),
    ],
)
def test_a_full_disk_is_one_line(
    where, strategy, left, tiny_mistral, tmp_path, capsys, monkeypatch
):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(Trainer, where, full)
    data = write_jsonl(tmp_path / "pairs.jsonl", string_rows(4, seed=1))
    argv = ("--model", tiny_mistral, "--dataset", data, "--output_dir", tmp_path / "out")
    said = error_of(capsys, *argv, *QUICK, "--save_strategy", strategy, "--save_steps", "1")
    assert "No space left on device" in said and said.endswith(left)
    # They would lie beside the model of the run before.
    assert not list((tmp_path / "out").glob("*_results.json"))
