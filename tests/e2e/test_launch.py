"""`oddsmith train --num_processes 2` from its start to its end, also after a process was killed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from oddsmith.demo.tasks import make_pairs
from oddsmith.training.checkpoints import newest_whole

STEPS = 40
LIMIT = 900  # seconds, on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": row["prompt"][0]["content"] + "\n",
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
        for row in make_pairs(24, 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model, data, out, *more):
    return [
        "--model", model, "--dataset", data, "--output_dir", out, "--max_steps", STEPS,
        "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1,
        "--learning_rate", "3e-3", "--max_length", 64, "--logging_steps", 1, "--use_cpu",
        "--bf16", "false", "--save_steps", 2, "--disable_tqdm", "true", "--num_processes", 2, *more,
    ]  # fmt: skip


def start(*words):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "LOCAL_RANK"},
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "oddsmith", "train", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def wait_for_checkpoint(run, folder, since):
    deadline = time.monotonic() + LIMIT
    while newest_whole(folder, since) is None:
        if run.poll() is not None or time.monotonic() > deadline:
            for process in psutil.Process().children(recursive=True):
                process.kill()
            pytest.fail(f"no checkpoint: {run.communicate()}")
        time.sleep(0.02)


@pytest.mark.slow  # four starts of the processes
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_started_again_stopped_and_resumed(processes, tiny_mistral, data, tmp_path):
    count = ("--num_processes", processes)
    whole = start(*arguments(tiny_mistral, data, tmp_path / "whole", *count))
    shown, errors = whole.communicate(timeout=LIMIT)
    assert whole.returncode == 0, errors
    assert shown.count("Saved the model and its tokenizer to") == 1

    out = tmp_path / "out"
    run = start(*arguments(tiny_mistral, data, out, "--max_restarts", 1, *count))
    wait_for_checkpoint(run, out, 0.0)
    (*_, last) = sorted(psutil.Process(run.pid).children(), key=lambda child: child.pid)
    killed = time.time()
    last.kill()
    wait_for_checkpoint(run, out, killed + 1.0)  # of the second start
    run.send_signal(signal.SIGTERM)
    shown, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 143, errors
    # Before it stands what the other process said of the one that was killed.
    _, found, second = errors.partition(f"Goes on from {out}/checkpoint-")
    assert found
    (line,) = re.findall("Stopped by SIGTERM after step .*", errors)
    assert (
        "Traceback" not in second.rpartition("Goes on from")[2] and "Saved the model" not in shown
    )

    _, _, command = line.partition("To go on: ")
    program, name, *words = shlex.split(command)
    assert (program, name, words[-2:]) == (
        "oddsmith",
        "train",
        ["--resume_from_checkpoint", "auto"],
    )
    again = start(*words)
    _, errors = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, errors
    mine, expected = weights_of(out), weights_of(tmp_path / "whole")
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[key], expected[key]) for key in expected)


def test_an_error_of_all_is_said_once(tiny_mistral, data, tmp_path):
    run = start(*arguments(tiny_mistral, tmp_path / "none.jsonl", tmp_path / "out"))
    _, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 1
    lines = [line for line in errors.splitlines() if line.strip()]
    assert [line for line in lines if "error" in line.lower()] == [
        f"oddsmith train: error: dataset {tmp_path / 'none.jsonl'}: no such file or folder"
    ]
    # What a library says when it is imported comes from the launcher and from one process.
    assert "Traceback" not in errors and max(map(lines.count, lines)) <= 2, errors
    # A faulty row is met by the process that makes the rows.
    bad = tmp_path / "bad.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[5]["chosen"] = None
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = start(*arguments(tiny_mistral, bad, tmp_path / "out", "--accelerate_config", "fsdp2"))
    _, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 1
    said = [line for line in errors.splitlines() if "error:" in line]
    assert len(said) == 1 and "row 5" in said[0], errors


def test_wrong_flags_start_nothing(tmp_path):
    for words, code, message in (
        (["--num_processes", "2", "--no_such", "1"], 2, "unknown argument --no_such"),
        (["--num_processes", "many"], 2, "invalid int value: 'many'"),
        (["--accelerate_config", "fsdp3"], 1, "--accelerate_config fsdp3: must be ddp, fsdp2"),
    ):
        run = start("--model", "m", "--dataset", "d", *words)
        _, errors = run.communicate(timeout=LIMIT)
        assert run.returncode == code and errors.count("error:") == 1, errors
        assert message in errors
