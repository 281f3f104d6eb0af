"""`oddsmith check` as a whole."""

import json
from dataclasses import replace

import jsonschema
import pytest

from oddsmith import cli
from oddsmith.check import folders, hardware, run, software, speed, trials
from oddsmith.errors import TorchError
from support.paths import ROOT

SCHEMA = json.loads((ROOT / "docs" / "check.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No times; and the metadata of a checkout's package may be those of an older build."""
    monkeypatch.setattr(speed, "_seconds", lambda device, call: (call(), 0.001)[1])
    monkeypatch.setattr(run, "package_problems", lambda found: [])


def test_this_machine(capsys):
    assert cli.main(["check"]) == 0
    text = capsys.readouterr().out
    assert "head, forward" in text
    assert text.endswith("What is installed can train.\n")


def test_json(capsys):
    assert cli.main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMA)
    assert found["ready"]
    assert len(found["trials"]) == len(list(trials.cases(trials.torch.device("cpu"))))
    assert found["runs"] == []


def test_a_family_that_differs(monkeypatch, capsys):
    right = trials.CASES[0].run

    def wrong(device, dtype):
        measure = right(device, dtype)
        return replace(measure, ours=[measure.ours[0] * 1.5])

    monkeypatch.setattr(trials, "CASES", (replace(trials.CASES[0], run=wrong), *trials.CASES[1:]))
    # A disk with little space is a problem too, but no run fails for it at once.
    monkeypatch.setattr(folders, "_LITTLE_SPACE", 1 << 62)
    assert cli.main(["check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMA)
    assert not found["ready"]
    assert found["problems"][0]["what"].startswith("head, forward in float32 on cpu is ")
    assert found["speeds"] == []


def test_gpus_of_apple_and_intel(monkeypatch, capsys):
    """torch reports them; what is used there is said, and that nobody has tried it."""
    devices = [trials.torch.device(name) for name in ("mps", "xpu:0", "xpu:1")]
    monkeypatch.setattr(hardware, "other_devices", lambda: devices)
    assert cli.main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMA)
    by = {
        (route["device"], route["by"])
        for route in found["routes"]
        if route["what"] == "head and loss"
    }
    assert by == {("cpu", "Rust"), ("mps", "torch"), ("xpu:0", "torch"), ("xpu:1", "torch")}
    assert {trial["device"] for trial in found["trials"]} == {"cpu"} and found["kernels"] == []
    assert len([each for each in found["problems"] if "nobody has trained on" in each["what"]]) == 3


def test_a_missing_package_is_fatal(monkeypatch, capsys):
    monkeypatch.setattr(run, "package_problems", software.package_problems)
    monkeypatch.setattr(run, "packages", lambda: {**software.packages(), "peft": None})
    assert cli.main(["check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {
        "what": "peft is missing",
        "remedy": 'pip install "peft>=0.19"',
        "fatal": True,
    } in found["problems"]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (TorchError("oddsmith needs torch 2.10 or newer and found torch 2.2"), "found torch 2.2"),
        (ModuleNotFoundError("No module named 'torch'"), "No module named 'torch'"),
    ],
)
def test_a_torch_that_does_not_fit(monkeypatch, capsys, error, what):
    def refuse():
        raise error

    monkeypatch.setattr(run, "import_core", refuse)
    assert cli.main(["check"]) == 1
    text = capsys.readouterr().out
    assert what in text
    assert text.endswith("What is installed cannot train.\n")
