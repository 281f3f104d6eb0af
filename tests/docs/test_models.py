"""docs/models.md: its rows are those of the script, and the paths are those that a trainer takes."""

import pytest
import transformers

from oddsmith.integrations.model_path import path_of
from support import model_table
from support.architectures import cases, configurations, core
from support.model_bases import BASES
from support.model_trial import path_name

TEXT = model_table.PAGE.read_text(encoding="utf-8")
ROWS = {row["Configuration"]: row for row in model_table.rows_of(TEXT)}
BASE_ROWS = model_table.rows_of(TEXT, ("Base", "Configuration", "Path", "Why"))
# Those whose trial takes a second at most: each path, windows, experts, a hybrid.
CHECKED = ("Llama", "Qwen2", "Phi3", "GPT2", "Mistral", "StableLm", "Falcon", "Jamba")

of_this_release = pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in TEXT,
    reason="the page is of another release of transformers",
)

LLAMA = {"name": "LlamaConfig", "model": "LlamaForCausalLM", "case": "default", "why": ""}
MEASURED = {"full": 1e-6, "LoRA": 2e-6}
HALF = {"full": [0.03, 0.02], "LoRA": [0.01, 0.04]}


def known():
    """Records as the script keeps them, from the page."""
    bad = {"full": [0.5, 0.1]}
    sharp = {"float32": {"full": 2e-5}, "float64": {"full": 1e-13}}
    return [
        {**LLAMA, "path": "packed", "limits": "short rows", "float32": MEASURED, "bfloat16": HALF},
        {**LLAMA, "name": "A", "path": "padded", "why": "x | y", "float32": {}, "bfloat16": bad},
        {**LLAMA, "name": "B", "case": "windows", "path": "plain", "untried": "too large"},
        {**LLAMA, "name": "C", "path": "not built", "why": "ValueError: no"},
        {**LLAMA, "name": "D", "path": "packed", **sharp},
        {**LLAMA, "name": "E", "path": "packed", **sharp, "float64": {"full": 1e-8}},
        {**LLAMA, "name": "F", "path": "packed", **sharp, "float64": {}},
    ]


def test_what_the_script_writes():
    text = model_table.page(known(), "5.0.0")
    rows = model_table.rows_of(text)
    assert [row["Configuration"] for row in rows][:3] == ["`LlamaConfig`", "`A`", "`B`, windows"]
    assert [row["Path"] for row in rows][:3] == ["packed", "padded", "plain"]
    assert [row["Why"] for row in rows][:3] == [
        "for short rows",
        "x \\| y",
        "not trained: too large",
    ]
    assert rows[0]["float32, LoRA"] == "2.0e-06"
    assert rows[0]["bfloat16"] == "3.0e-02 (2.0e-02)"
    assert rows[2]["bfloat16"] == "-"
    assert rows[3]["float32"] == "2.0e-05 (1.0e-13)"
    assert "Of the 6 models below, 4 packed, 1 padded and 1 plain." in text
    assert "1 of these 1 bases are packed." in text
    assert "More than rounding apart: `A`, `E`, `F`." in text
    assert "| `C` | ValueError: no |" in text


def test_the_page_counts_its_rows():
    assert model_table.summary(row["Path"] for row in ROWS.values()) in TEXT
    packed = sum(row["Path"] == "packed" for row in BASE_ROWS)
    assert f"{packed} of these {len(BASE_ROWS)} bases are packed." in TEXT
    assert packed >= 20
    for row in BASE_ROWS:
        assert {
            key: ROWS[row["Configuration"]][key] for key in ("Path", "Why")
        }.items() <= row.items()


@of_this_release
def test_every_architecture_is_there():
    named = {title.split("`")[1] for title in ROWS}
    missing = model_table.rows_of(TEXT, ("Configuration", "Why"))
    named |= {row["Configuration"].split("`")[1] for row in missing}
    assert named == set(configurations())
    assert {base for base, *_ in BASES} == {row["Base"] for row in BASE_ROWS}


def test_no_results_differ():
    assert "More than rounding apart" not in TEXT


@of_this_release
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKED)
def test_paths_are_those_of_the_page(name):
    (options,) = [options for case, options in cases(f"{name}Config") if case == "default"]
    found = path_of(core(f"{name}Config", options))
    row = ROWS[f"`{name}Config`"]
    assert path_name(found) == row["Path"]
    for reason in found.reasons:
        assert reason[:60] in row["Why"]
    if path_name(found) == "packed" and str(found.limits):
        assert str(found.limits) in row["Why"]
