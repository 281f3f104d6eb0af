"""The path of a model, from its folder."""

import json

from transformers import FalconConfig, LlamaConfig, T5Config

from oddsmith import cli
from oddsmith.inspection.path import find_path

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROW = {"prompt": "a b c ", "chosen": "f g", "rejected": "h i"}


def test_of_a_folder_with_a_configuration(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "llama")
    T5Config().save_pretrained(tmp_path / "t5")
    assert find_path(str(tmp_path / "llama"), None, False).batches == "packed"
    assert find_path(str(tmp_path / "t5"), None, False).head == "plain"


def test_of_a_folder_with_a_tokenizer_only(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert find_path(str(tmp_path), None, False) is None


def test_inspect_shows_it(tmp_path, tokenizer, capsys):
    folder, source = tmp_path / "model", tmp_path / "rows.jsonl"
    tokenizer.save_pretrained(folder)
    FalconConfig(**SIZES).save_pretrained(folder)
    source.write_text(json.dumps(ROW) + "\n")
    argv = ["inspect", str(source), "--model", str(folder)]
    assert cli.main(argv) == 0
    reason = "its attention does not get the packed row"
    assert f"  model: Batches keep their padding: {reason}.\n" in capsys.readouterr().out
    assert cli.main([*argv, "--json"]) == 0
    path = json.loads(capsys.readouterr().out)["path"]
    assert path == {"batches": "padded", "head": "fused", "reasons": [reason]}
