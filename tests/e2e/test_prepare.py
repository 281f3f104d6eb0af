"""Other data, prepared, inspected and trained on; and real files, if available."""

import gzip
import json

import pytest

from oddsmith import cli
from oddsmith.demo.tasks import make_pairs
from support.paths import SHARED


def oasst_messages(count, seed):
    rows = []
    for index, row in enumerate(make_pairs(count, seed)):
        tree = {"lang": "en", "deleted": False, "review_result": True}
        rows.append({**tree, "message_id": f"q{index}", "parent_id": None, "role": "prompter",
                     "text": row["prompt"][0]["content"], "rank": None})  # fmt: skip
        for rank, side in enumerate(("chosen", "rejected")):
            rows.append({**tree, "message_id": f"{side}{index}", "parent_id": f"q{index}",
                         "role": "assistant", "text": row[side][0]["content"], "rank": rank})  # fmt: skip
    return rows


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_prepare_inspect_train(suffix, tiny_mistral, tmp_path, capsys):
    source = tmp_path / "messages.jsonl.gz"
    with gzip.open(source, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in oasst_messages(24, seed=4))
    pairs = tmp_path / "pairs" / f"train{suffix}"
    assert cli.main(["prepare", str(source), "--output", str(pairs)]) == 0
    shown = capsys.readouterr().out
    assert "read             72  messages (OpenAssistant, flat)" in shown
    assert f"pairs            24  written to {pairs}" in shown

    # The folder also has the summary, which is not data.
    assert cli.main(["inspect", str(pairs.parent), "--model", str(tiny_mistral), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows"] == 24
    assert not any(finding["rows"] for finding in figures["findings"].values())

    out = tmp_path / "out"
    assert cli.main([
        "train", "--model", str(tiny_mistral), "--dataset", str(pairs.parent), "--output_dir",
        str(out), "--max_steps", "1", "--use_cpu", "--bf16", "false", "--save_strategy", "no",
        "--disable_tqdm", "true", "--per_device_train_batch_size", "2",
    ]) == 0  # fmt: skip
    assert (out / "model.safetensors").is_file()


@pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="ODDSMITH_SHARED names no folder with the data"
)
@pytest.mark.parametrize(
    ("name", "kind", "read", "dropped"),
    [
        ("alpacaeval_mistral_orpo.jsonl.gz", "pairs", 805, {"same answers"}),
        ("hh_harmless_test_head.jsonl.gz", "hh", 1800, {"empty answer", "duplicate prompt"}),
    ],
)
def test_real_files(name, kind, read, dropped, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert cli.main(["prepare", str(SHARED / "data" / name), "--output", str(out)]) == 0
    summary = json.loads((tmp_path / "pairs.summary.json").read_text())
    assert summary["format"] == kind
    assert summary["rows"]["read"] == read
    assert set(summary["rows"]["dropped"]) == dropped
    assert sum(summary["rows"]["dropped"].values()) < read / 50
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == summary["rows"]["kept"] == summary["diversity"]["distinct_prompts"]
    for row in rows:
        assert row["prompt"][-1]["role"] == "user"
        assert [message["role"] for message in row["chosen"]] == ["assistant"]
        # The question is asked once.
        assert row["prompt"][-1] not in row["chosen"] + row["rejected"]
