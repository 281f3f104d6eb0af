"""Every benchmark in small, so that none rots: it runs, agrees with its peers and records its rows."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from support.paths import BENCHES, ROOT

RELEASE = ".".join(torch.__version__.split(".")[:2])
# What each is called with beside --tiny, and rows that it must leave.
RUNS = {
    "bench_border": ("--repeats 2", {f"border_torch_{RELEASE}_argument_time"}),
    # Compiling the naive form takes half a minute.
    "bench_head": ("--no-compile --repeats 2", {"head_16x64_trained_trl_time"}),
    "bench_quant": ("--repeats 2", {"nf4_linear_1_token_64x128_bfloat16_bitsandbytes_time"}),
    "bench_optim_adamw": ("--repeats 2", {"adamw8bit_0.00819m_bitsandbytes_memory"}),
    "bench_optim_low_rank": ("--repeats 2", {"galore_step_24x96_galore_torch_time"}),
    "bench_data": (
        "--repeats 1 --forms strings --shared missing",
        {"tokenize_made_up_strings_trl_rate"},
    ),
    "bench_checkpoint": ("--repeats 1", {"checkpoint_0.0b_merge_time"}),
    "bench_training": ("--repeats 1 --steps 2", {"step_tiny_generated_trl_memory"}),
    "bench_packing": ("--repeats 2", {"packing_96x16_float32_flash_time"}),
    "bench_demo": ("", {"demo_all_accuracy_after"}),
}


def run(command: list[str], table) -> tuple[str, dict[str, dict[str, str]]]:
    """What a benchmark prints, and the rows that it records, by their ids."""
    done = subprocess.run(
        [sys.executable, *command, "--tiny", "--record", str(table)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # One thread: on a busy machine a team of them waits for its slowest.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for row in rows.values():
        middle = float(row["p50"])
        assert math.isfinite(middle) and int(row["runs"]) >= 1 and row["unit"]
        if row["runs"] != "1":
            assert float(row["p20"]) <= middle <= float(row["p80"])
    return done.stdout, rows


def test_every_benchmark_is_here():
    assert {path.stem for path in BENCHES.glob("bench_*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_in_small(name, tmp_path):
    options, expected = RUNS[name]
    command = [f"benches/{name}.py", "--threads", "1", *options.split()]
    _, rows = run(command, tmp_path / "rows.csv")
    assert expected <= rows.keys()
    assert {row["bench"] for row in rows.values()} == {name}


def test_a_new_measurement_replaces_its_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    results = importlib.import_module("benches.results")
    recorder = results.Recorder("bench_head", ["torch"], "this machine", tmp_path / "rows.csv")
    recorder.add("a_time", "a case", "oddsmith", "time", "s", [3.0, 1.0, 2.0, 5.0, 4.0])
    recorder.add("b_memory", "b case", "trl", "memory", "MB", [7.0])
    recorder.add("a_time", "a case", "oddsmith", "time", "s", [6.0])
    first, second = results.read_rows(tmp_path / "rows.csv")
    assert (first["id"], first["p50"], first["p20"], first["runs"]) == ("a_time", "6", "", "1")
    assert (second["id"], second["unit"], second["machine"]) == ("b_memory", "MB", "this machine")
    assert f"torch={torch.__version__.split('+')[0]}" in first["versions"]
    with pytest.raises(ValueError, match="lower case"):
        recorder.add("A time", "a case", "oddsmith", "time", "s", [6.0])


# ---- on a GPU: the same code without one ----


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benches.gpu.models")


def test_every_part_for_a_gpu_runs_in_small(tmp_path):
    posted = tmp_path / "gpu.json"
    command = f"-m benches.gpu --device cpu --only mistral-tiny kernels --json {posted}".split()
    printed, rows = run(command, tmp_path / "gpu.csv")
    assert "failed:" not in printed
    names = {}
    for row in rows.values():
        names.setdefault(row["case"].split(",")[0], set()).add(row["implementation"])
    ours_and_theirs = {"oddsmith", "bitsandbytes"}
    assert names["mistral-tiny"] >= {"oddsmith, packed", "oddsmith, padded", "TRL, bitsandbytes"}
    assert names["NF4 quantise"] == names["NF4 dequantise"] == ours_and_theirs
    assert names["NF4 linear"] == {*ours_and_theirs, "weight in full"}
    assert names["head"] >= {"oddsmith", "TRL, chunked"}
    report = json.loads(posted.read_text())
    assert report["rows"] and report["failed"] == [] and "torch" in report["packages"]
    assert {"cpu_nf4_quantize_128x256_float32_oddsmith_time"} <= rows.keys()
    # All trainers begin with the same weights and rows.
    (line,) = [line for line in printed.splitlines() if "first losses:" in line]
    losses = [float(part.split()[-1]) for part in line.split(",") if part[-1].isdigit()]
    assert len(losses) >= 3 and max(losses) - min(losses) <= 1e-3 * losses[0]


@pytest.mark.parametrize(
    "name, tag",
    {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-40GB": "a100",
        "Tesla T4": "t4",
        "NVIDIA GeForce RTX 4090": "nvidia_geforce_rtx_4090",
        "CPU": "cpu",
    }.items(),
)
def test_rows_begin_with_the_gpu(name, tag, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    assert importlib.import_module("benches.gpu.bench").device_tag(name) == tag


def test_lengths_are_those_of_the_pairs(models):
    drawn = torch.tensor(models.draw_lengths(20_000, 1.0)).double()
    for side, quantiles in zip(drawn.T, models.QUANTILES.values()):
        shares = [(side < q).double().mean() + (side == q).double().mean() / 2 for q in quantiles]
        assert all(abs(share - i / 20) < 0.03 for i, share in enumerate(shares))
    ranks = drawn.argsort(0).argsort(0).double().T
    correlation = torch.corrcoef(ranks)
    assert correlation[1, 2] == pytest.approx(0.77, abs=0.02) and correlation[0].sum() < 1.05
    assert models.draw_lengths(3, 0.05, seed=1) != models.draw_lengths(3, 0.05, seed=2)


def test_texts_have_the_lengths_that_were_drawn(models):
    lengths = models.draw_lengths(5, 0.3)
    tokenizer = models.word_tokenizer(300)
    for (prompt, chosen, _), row in zip(lengths, models.rows_of(lengths, 300)):
        ids = tokenizer(row["prompt"] + row["chosen"], add_special_tokens=False)["input_ids"]
        assert len(ids) == prompt + chosen and min(ids) >= 3
