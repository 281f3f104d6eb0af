"""Verdicts on kernels and compiled kernels that are damaged, or that others may have written."""

import json

import pytest

from oddsmith import _core
from oddsmith.check import kernels, trial_process, verdicts
from oddsmith.check.findings import Verdict
from support.broken_kernels import FAMILIES


@pytest.fixture
def counted(untried, monkeypatch):
    """Counts the self-tests instead of running them."""
    calls = []

    def count(gpu, uuid, families):
        calls.append(families)
        return [Verdict("cuda:0", family, 0.1, "float32", 0.0, 1e-6) for family in families]

    monkeypatch.setattr(trial_process, "verdicts", count)
    return calls


def settle_again():
    _core.trust_kernels(0, None)
    kernels.settle(0)


def test_damage_is_said(counted, tmp_path, caplog):
    settle_again()
    (path,) = tmp_path.glob("verdicts-*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    found = json.loads(path.read_text())
    found["verdicts"][0]["deviation"] = 1e-9
    path.write_text(json.dumps(found))
    settle_again()
    assert len(counted) == 2
    assert f"{path} is damaged or was changed; the kernels are tried again" in caplog.text


@pytest.mark.parametrize("how", ["open folder", "link to a folder", "open file", "link to a file"])
def test_verdicts_that_others_may_have_written(counted, monkeypatch, tmp_path, caplog, how):
    folder = tmp_path / "kernels"
    monkeypatch.setattr(verdicts, "kernel_folder", lambda: folder)
    settle_again()
    (path,) = folder.glob("verdicts-*.json")
    assert folder.stat().st_mode & 0o777 == 0o700
    if how == "open folder":
        folder.chmod(0o770)
    elif how == "open file":
        path.chmod(0o666)
    else:
        moved = folder if how == "link to a folder" else path
        moved.rename(tmp_path / "moved")
        moved.symlink_to(tmp_path / "moved")
    settle_again()
    assert len(counted) == 2 and _core.trusted_kernels(0) == FAMILIES
    what = folder if "folder" in how else path
    why = "is a link" if "link" in how else "can be changed by others"
    assert f"{what} {why}" in caplog.text


def test_what_the_core_says_in_the_other_process_is_said_here(untried, tmp_path, caplog):
    """Its folder is this one's, with a kernel that is damaged."""
    settle_again()
    (kernel, *_) = sorted(tmp_path.glob("*.cubin"))
    kernel.write_bytes(b"of another")
    (verdict,) = tmp_path.glob("verdicts-*.json")
    verdict.unlink()
    settle_again()
    assert f"{kernel} is damaged or was changed; it is compiled again" in caplog.text
