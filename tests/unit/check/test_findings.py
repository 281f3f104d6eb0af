"""What was found: for a person, and as JSON that the schema of the docs describes."""

import json

import jsonschema
import pytest

from oddsmith.check.findings import (
    Findings,
    Folder,
    Gpu,
    Problem,
    Processor,
    Route,
    Run,
    Speed,
    Trial,
    Verdict,
)
from support.paths import ROOT

SCHEMA = json.loads((ROOT / "docs" / "check.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def findings():
    return Findings(
        packages={"torch": "2.15.0", "trl": None},
        software={"Python": "3.13.0"},
        processor=Processor("A CPU", 8, 8, "AVX2", False, 2**34, None),
        gpus=[Gpu(0, "A GPU", "9.0", 80 * 2**30, 70 * 2**30, True)],
        folders=[Folder("kernels", "/a/b", 2**30, True, False)],
        routes=[Route("cpu", "head and loss", "Rust", "on AVX2")],
        kernels=[
            Verdict("cuda:0", "nf4_product", 0.25, "bfloat16", 0.5e-3, 1e-3),
            Verdict("cuda:0", "adamw8", 0.5, "float16", 0.5, 1e-3),
            Verdict("cuda:0", "adamw32", 0.0, error="NVRTC: no"),
        ],
        trials=[
            Trial("cpu", "head, forward", "float32", 1e-7, 1e-6),
            Trial("cuda:0", "8-bit blocks", "float32", 0.5, 1e-6),
            Trial("cuda:0", "AdamW, 8 bits", "float16", None, None, "RuntimeError: no kernel"),
        ],
        speeds=[Speed("cuda:0", "copy", 0.5, 3000.0, "GB/s", 1.0)],
        runs=[
            Run("cpu", "float32", 1.0, 1.00001, 1e-4, "packed"),
            Run("cpu", "bfloat16", 1.0, 1.2, 0.05, "packed"),
            Run("cpu", "QLoRA", None, None, 1e-4, "", "OSError: no"),
        ],
        problems=[Problem("the disk is full", "make room")],
    )


def test_the_json_is_what_the_schema_says(findings):
    found = json.loads(json.dumps(findings.as_json(), allow_nan=False))
    jsonschema.validate(found, SCHEMA)
    assert [trial["passed"] for trial in found["trials"]] == [True, False, False]
    assert [run["passed"] for run in found["runs"]] == [True, False, False]
    assert [verdict["passed"] for verdict in found["kernels"]] == [True, False, False]


@pytest.mark.parametrize("change", [{"more": 1}, {"ready": "yes"}, {"gpus": [{"index": -1}]}])
def test_the_schema_refuses_other_json(findings, change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**findings.as_json(), **change}, SCHEMA)


def test_a_fatal_problem_decides(findings):
    assert findings.ready
    findings.problems.append(Problem("torch is missing", "pip install torch", fatal=True))
    assert not findings.ready
    assert not findings.as_json()["ready"]
    assert list(findings.lines())[-1] == "What is installed cannot train."


def test_the_lines_have_everything(findings):
    text = "\n".join(findings.lines())
    for part in (
        "torch           2.15.0",
        "trl             none",
        "8 cores, 8 threads, AVX2, without bfloat16",
        "memory 16.0 GB, available unknown",
        "cuda:0: A GPU, capability 9.0, with bfloat16, 70.0 GB of 80.0 GB free",
        "others can write to it",
        "used, 5.0e-04 off (allowed 1.0e-03), 0.25 s",
        "not used: 5.0e-01 off in float16, and 1.0e-03 is allowed",
        "not used: NVRTC: no",
        "right, 1.0e-07 off",
        "WRONG, 5.0e-01 off",
        "failed: RuntimeError: no kernel",
        "3000.00 GB/s",
        "NOT the same",
        "failed: OSError: no",
        "the disk is full; make room",
        "What is installed can train.",
    ):
        assert part in text, part
