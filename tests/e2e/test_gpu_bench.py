"""The benchmark of cards, in small and without one."""

import csv
import os
import subprocess
import sys

import pytest
import torch

from support.paths import BENCHES


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    import gpu_models

    return gpu_models


def test_every_part_runs_in_small(tmp_path):
    table = tmp_path / "gpu.csv"
    arguments = f"--tiny --device cpu --only mistral-tiny kernels --csv {table}".split()
    done = subprocess.run(
        [sys.executable, str(BENCHES / "gpu.py"), *arguments],
        capture_output=True,
        text=True,
        # One thread: on a busy machine a team of them waits for its slowest.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "failed:" not in done.stdout, done.stdout + done.stderr
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {}
    for row in rows:
        assert 0 < float(row["p20_s"]) <= float(row["p50_s"]) <= float(row["p80_s"])
        names.setdefault(row["case"].split(",")[0], set()).add(row["name"])
    ours_and_theirs = {"oddsmith", "bitsandbytes"}
    assert names["mistral-tiny"] >= {"oddsmith, packed", "oddsmith, padded", "TRL, bitsandbytes"}
    assert names["NF4 quantise"] == names["NF4 dequantise"] == ours_and_theirs
    assert names["NF4 linear"] == {*ours_and_theirs, "weight in full"}
    assert names["head"] >= {"oddsmith", "TRL, chunked"}
    # All trainers begin with the same weights and rows.
    (line,) = [line for line in done.stdout.splitlines() if "first losses:" in line]
    losses = [float(part.split()[-1]) for part in line.split(",") if part[-1].isdigit()]
    assert len(losses) >= 3 and max(losses) - min(losses) <= 1e-3 * losses[0]


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
