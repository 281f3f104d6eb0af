"""Releases of packages, and what is missing or too old."""

import platform
from importlib.metadata import version

import pytest

from oddsmith.check import software


def test_what_is_installed():
    found = software.packages()
    assert found["torch"] == version("torch")
    assert found["oddsmith"] == version("oddsmith")
    assert set(software.PEERS) <= set(found)
    assert software.system()["Python"] == platform.python_version()


def test_this_environment_has_what_is_needed():
    found = software.packages()
    # The metadata of a checkout's package may be those of an older build.
    assert not [p for p in software.package_problems(found) if "torch" not in p.what]


@pytest.mark.parametrize(
    ("version", "what"),
    [(None, "peft is missing"), ("0.3.0", "peft is 0.3.0, and >=0.19 is needed")],
)
def test_a_package_that_does_not_fit(version, what):
    found = {**software.packages(), "peft": version}
    (problem,) = [p for p in software.package_problems(found) if "peft" in p.what]
    assert problem.what == what
    assert problem.remedy == 'pip install "peft>=0.19"'
    assert problem.fatal


def test_a_newer_release_is_no_problem():
    found = dict.fromkeys(software.packages(), "99.0.dev1")
    assert not software.package_problems(found)
