"""The self-test of the kernels, on an emulated GPU with kernels that are broken on purpose."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from oddsmith import _core, functional
from oddsmith.check import kernels, trial_process, trials, verdicts
from oddsmith.check.findings import Verdict
from support import broken_kernels, emulation
from support.broken_kernels import FAMILIES, WAYS, broken, fault

CPU = torch.device("cpu")


def faults(found):
    return {each.family: each.fault for each in found if not each.passed}


def break_by(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def assert_right_without(families, among=FAMILIES):
    """Operations where these families are broken still and not used."""
    for case in trials.CASES:
        # A kernel with a fault would be launched here.
        dtypes = trials.dtypes(CPU) if case.family in families else (torch.float32,)
        for dtype in dtypes if case.family in among else ():
            trial = trials.outcome(case, CPU, dtype)
            assert trial.passed, trial


def test_every_family_has_its_broken_kernel_and_its_name():
    assert [name for name, _ in _core.kernel_families()] == FAMILIES
    assert list(kernels._FAMILIES) == FAMILIES


def test_the_trial_launches_every_kernel(emulated_driver):
    launched = set()
    for case in trials.CASES:
        for dtype in trials.dtypes(CPU):
            assert trials.outcome(case, CPU, dtype).passed
    launched = {launch.kernel for launch in emulated_driver.launches()}
    assert launched == emulation.kernel_names()


def test_families_that_are_not_trusted_go_through_torch(emulated_driver):
    _core.trust_kernels(0, [])
    try:
        for case in trials.CASES:
            for dtype in trials.dtypes(CPU):
                trial = trials.outcome(case, CPU, dtype)
                assert trial.passed, trial
        assert emulated_driver.launches() == []
    finally:
        _core.trust_kernels(0, FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_that_is_not_trusted(emulated_driver, family):
    """Its kernels are not launched, and all results are right."""
    _core.trust_kernels(0, [name for name in FAMILIES if name != family])
    kernel, _ = broken_kernels.KERNELS[family]
    try:
        for case in trials.CASES:
            if case.family.split("_")[0] == family.split("_")[0]:
                trial = trials.outcome(case, CPU, torch.float32)
                assert trial.passed, trial
        trials.outcome(trials.CASES[-1 - (family == "adamw32")], CPU, torch.float32)
        launched = [launch.kernel for launch in emulated_driver.launches()]
        assert launched and not any(name.startswith(kernel) for name in launched)
    finally:
        _core.trust_kernels(0, FAMILIES)


def test_wrong_values(untried, monkeypatch, caplog):
    """Of every second family, whose faults do not hide those of others."""
    some = ["head_expectation", "nf4_quantize", "nf4_product", "adamw8"]
    monkeypatch.setenv("EMULATOR_FAULT", fault("wrong", *some))
    with caplog.at_level(logging.WARNING):
        functional.quantize_nf4(torch.randn(64, 64))
    found = kernels.found(0)
    assert list(faults(found)) == some
    assert set(_core.trusted_kernels(0) or ()) == set(FAMILIES) - set(some)
    (record,) = caplog.records
    text = record.getMessage()
    assert "failed their self-test on cuda:0 (emulated GPU, capability 9.0, driver unknown)" in text
    assert "AdamW with moments of 8 bits (adamw8): " in text and "oddsmith check --json" in text
    assert_right_without(some)
    # Another process reads what this one found, and says it too.
    _core.trust_kernels(0, None)
    monkeypatch.setattr(trial_process, "verdicts", None)
    with caplog.at_level(logging.WARNING):
        assert kernels.found(0) == found
    assert [each.getMessage() for each in caplog.records] == [text, text]


def tried(*families):
    return trial_process.verdicts(0, None, list(families))


def test_kernels_that_cannot_be_used_at_all(untried, monkeypatch):
    """Sources that do not compile or load; and a context that is ruined, after which another process goes on."""
    monkeypatch.setenv("EMULATOR_COMPILE_ERROR", "nf4")
    monkeypatch.setenv("EMULATOR_FAULT", f"load:head_batch,{fault('bounds', 'adamw8')}")
    nf4, batch, eight, full = tried("nf4_product", "head_batch", "adamw8", "adamw32")
    assert not nf4.passed and "nf4(1): error: broken on purpose" in nf4.fault
    assert not batch.passed and "CUDA_ERROR_NO_BINARY_FOR_GPU" in batch.fault
    assert not eight.passed and "CUDA_ERROR_ILLEGAL_ADDRESS" in eight.fault
    assert full.passed, full


# ---- what the other process does ----

# Instead of the process that tries: what it does with each family is in its name.
PRETENDED = """
import json, sys, time
def say(**line):
    print("oddsmith-trial " + json.dumps(line), flush=True)
asked = json.loads(sys.argv[1])
if "absent" in asked["families"]:
    sys.exit("no such library")
print("a library says something")
say(load=asked["families"][0]) if "silent" not in asked["families"] else time.sleep(60)
for family in asked["families"]:
    say(load=family)
    if family == "compiles": time.sleep(60)
    say(begin=family)
    if family == "hangs": time.sleep(60)
    if family == "slow": time.sleep(1.0)
    if family == "dies":
        print("terminate called", file=sys.stderr)
        sys.exit(7)
    error = "broken" if family == "fails" else None
    say(verdict={"family": family, "seconds": 0.1, "deviation": 0.0, "allowed": 1.0, "error": error})
    if error:
        break
"""


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(trial_process, "_PROGRAM", ("-c", PRETENDED))
    monkeypatch.setattr(trial_process, "LIMITS", (0.5, 2.5))
    monkeypatch.setattr(trial_process, "LOAD_LIMIT", 3.0)


def test_what_becomes_of_families(pretended):
    names = ["good", "hangs", "slow", "fails", "dies", "compiles", "last"]
    found = tried(*names)
    assert [verdict.family for verdict in found] == names
    assert [verdict.passed for verdict in found] == [True, False, True, False, False, False, True]
    assert faults(found) == {
        "hangs": "its kernels have not ended within 2.5 s",
        "fails": "broken",
        "dies": "the process ended: terminate called (exit status 7)",
        "compiles": "its compilation has not ended within 3 s",
    }
    assert {verdict.device for verdict in found} == {"cuda:0"}


def test_a_process_that_does_not_start(pretended, monkeypatch):
    monkeypatch.setattr(trial_process, "START_LIMIT", 1.0)
    with pytest.raises(trial_process.TrialError, match="a process did not start within 1 s"):
        tried("silent")


def test_a_process_that_ends_at_once(pretended):
    words = r"ended before it tried anything: no such library \(exit status 1\)"
    with pytest.raises(trial_process.TrialError, match=words):
        tried("absent")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_broken(untried, monkeypatch, family, way):
    if way == "hang":
        monkeypatch.setattr(trial_process, "LIMITS", (20.0, 40.0))
    break_by(monkeypatch, broken(way, family))
    sources = dict(_core.kernel_families())
    alike = [name for name in FAMILIES if set(sources[name]) & set(sources[family])]
    if way != "compile" or family == "head_batch":
        # Another one, which is to pass.
        alike, expected = sorted({family, alike[-1], "blockwise8"}, key=FAMILIES.index), [family]
    else:
        expected = alike
    monkeypatch.setattr(_core, "kernel_families", lambda: [(name, sources[name]) for name in alike])
    found = kernels.found(0)
    assert list(faults(found)) == expected
    assert _core.trusted_kernels(0) == [name for name in alike if name not in expected]
    assert_right_without(expected, alike)


# ---- the file ----


def verdict(family="adamw8", **parts):
    return Verdict(
        "cuda:0", family, 0.1, **{"dtype": "float32", "deviation": 0.0, "allowed": 1.0, **parts}
    )


@pytest.fixture
def counted(untried, monkeypatch):
    """Counts the self-tests instead of running them."""
    calls = []

    def count(gpu, uuid, families):
        calls.append(families)
        return [verdict(family) for family in families]

    monkeypatch.setattr(trial_process, "verdicts", count)
    return calls


def settle_anew():
    _core.trust_kernels(0, None)
    kernels.settle(0)


def test_verdicts_are_kept(counted):
    for _ in range(3):
        settle_anew()
    assert counted == [FAMILIES]
    kernels.settle(0)
    assert len(counted) == 1


@pytest.mark.parametrize(
    "change", ["sources", "driver", "name", "uuid", "torch", "family", "damage"]
)
def test_verdicts_are_void_with_any_change(counted, monkeypatch, tmp_path, change):
    settle_anew()
    gpu = kernels._look_at(0)
    if change == "sources":
        monkeypatch.setattr(_core, "kernel_identity", lambda gpu: "of other sources")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    elif change in ("driver", "name", "uuid"):
        other = kernels._Gpu(**{**vars(gpu), change: "another"})
        monkeypatch.setattr(kernels, "_look_at", lambda gpu: other)
    else:
        (path,) = tmp_path.glob("verdicts-*.json")
        text = path.read_text()
        if change == "family":
            found = json.loads(text)
            found["verdicts"].pop()
            text = json.dumps(found)
        path.write_text(text if change == "family" else text[:-20])
    settle_anew()
    assert len(counted) == 2
    settle_anew()
    assert len(counted) == 2


def test_a_folder_that_cannot_be_written_to(counted, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verdicts, "kernel_folder", lambda: tmp_path / "file" / "folder")
    for _ in range(2):
        settle_anew()
        assert _core.trusted_kernels(0) == FAMILIES
    assert len(counted) == 2


def test_one_process_tries_and_the_others_wait(counted, monkeypatch):
    """Each thread has a lock of its own, as processes have."""
    start = threading.Barrier(4)
    known, results = kernels._look_at(0), []
    right = trial_process.verdicts

    def slowly(*arguments):
        threading.Event().wait(0.3)
        return right(*arguments)

    monkeypatch.setattr(trial_process, "verdicts", slowly)

    def run():
        start.wait()
        results.append(kernels._try(0, known, "key", FAMILIES, False))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1 and results == results[:1] * 4


def test_a_lock_that_is_not_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "kernel_folder", lambda: tmp_path)
    with verdicts.locked("key", 1.0), verdicts.locked("key", 0.1):
        pass


def test_the_oldest_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "kernel_folder", lambda: tmp_path)
    monkeypatch.setattr(verdicts, "_KEPT", 2)
    for i, key in enumerate("abc"):
        verdicts.write(key, [verdict()])
        os.utime(tmp_path / f"verdicts-{key}.json", (i, i))
    verdicts.write("d", [verdict()])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "verdicts-c.json",
        "verdicts-d.json",
    ]


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("asked", "trusted", "count"),
    [
        ("", FAMILIES, 1),
        ("tested", FAMILIES, 1),
        ("retest", FAMILIES, 2),
        ("untested", FAMILIES, 0),
        ("none", [], 0),
    ],
)
def test_the_environment_variable(counted, monkeypatch, asked, trusted, count):
    monkeypatch.setenv(kernels.VARIABLE, asked)
    for _ in range(2):
        settle_anew()
        assert _core.trusted_kernels(0) == trusted
    assert len(counted) == count


def test_a_value_that_there_is_not(untried, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "of")
    with pytest.raises(
        ValueError, match="ODDSMITH_KERNELS is 'of'; must be tested, retest, untested or none"
    ):
        functional.quantize_nf4(torch.ones(64))
    assert _core.trusted_kernels(0) is None and untried.launches() == []


@pytest.mark.parametrize("lack", ["python", "frozen", "start", "silence"])
def test_a_self_test_that_cannot_be_run(untried, monkeypatch, caplog, lack):
    """Nothing is trusted, and nothing is kept."""
    if lack == "python":
        monkeypatch.setattr(sys, "executable", "")
    elif lack == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    elif lack == "start":
        monkeypatch.setattr(sys, "executable", "/no/python")
    else:
        monkeypatch.setattr(sys, "executable", "/bin/false")
    with caplog.at_level(logging.WARNING):
        functional.quantize_nf4(torch.ones(64))
    assert "cannot be run on cuda:0: " in caplog.text and "ODDSMITH_KERNELS=untested" in caplog.text
    assert _core.trusted_kernels(0) == [] and untried.launches() == []
    assert not list(verdicts.kernel_folder().glob("verdicts-*.json"))


def test_an_interrupt_is_an_interrupt(untried, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial_process, "verdicts", interrupt)
    with pytest.raises(KeyboardInterrupt):
        functional.quantize_nf4(torch.ones(64))
    assert _core.trusted_kernels(0) is None


@pytest.mark.parametrize(
    ("visible", "gpu", "expected"),
    [(None, 1, "1"), ("3,5", 1, "5"), ("GPU-a, MIG-b", 1, "MIG-b"), ("", 0, "0"), ("4", 2, "4")],
)
def test_a_process_sees_the_gpu_alone(visible, gpu, expected):
    given = {"HOME": "/h"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    made = trial_process.environment(given, gpu)
    assert made["CUDA_VISIBLE_DEVICES"] == expected and made["HOME"] == "/h"
    assert given.get("CUDA_VISIBLE_DEVICES") == visible


# ---- programs ----

NOTEBOOK = """
import torch
from oddsmith import _core, functional
from oddsmith.check import trial_process
import __main__
__main__.__dict__.pop("__file__", None)
trial_process.LIMITS = (120.0, 120.0)
functional.quantize_nf4(torch.randn(64))
print(len(_core.trusted_kernels(0)), len(functional.__name__))
"""


@pytest.mark.slow
def test_a_program_without_a_file(tmp_path):
    """As in a notebook, which is read from a pipe here."""
    environment = {
        **os.environ,
        "ODDSMITH_KERNELS": "tested",
        "ODDSMITH_CUDA_DRIVER": str(emulation.build()),
        "ODDSMITH_NVRTC": str(emulation.build_compiler()),
        "ODDSMITH_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable], input=NOTEBOOK, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 ")


WITHOUT_A_GPU = """
import sys
import torch
from oddsmith import functional
packed, state = functional.quantize_nf4(torch.randn(64))
functional.linear_logps(torch.ones(1, 4), torch.ones(8, 4), torch.zeros(1, dtype=torch.int64))
assert not [name for name in sys.modules if name.startswith("oddsmith.check")]
"""


def test_nothing_is_tried_without_a_gpu():
    environment = {**os.environ, "ODDSMITH_KERNELS": "tested", "ODDSMITH_CUDA_DRIVER": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_GPU], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
