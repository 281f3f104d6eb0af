"""The files around the code are true: paths and commands exist, hooks and CI run what `make lint` runs."""

import re

import pytest
import yaml

from support.paths import ROOT

PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/negative_results.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target: str) -> str:
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]


@pytest.mark.parametrize("name", PAGES)
def test_paths_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    roots = "src|python|kernels|tests|benches|docs|examples"
    named = re.findall(rf"(?<![\w/.~])((?:{roots})/[\w./-]*\w/?|\.ci/run)(?![\w<*])", text)
    named += re.findall(r"\]\(([^)#:]+)\)", text)
    for path in named:
        assert (ROOT / path).exists(), f"{name} names {path}"
    assert len(named) >= (0 if name in ("CHANGELOG.md", "SECURITY.md") else 15)


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{name}: make {target}"


def test_constants_that_are_named_exist():
    text = (ROOT / "docs" / "negative_results.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)` in\s+`([\w./]+\.\w+)`", text)
    assert len(named) >= 3
    for constant, path in named:
        assert re.search(rf"\b{constant}\b", (ROOT / path).read_text(encoding="utf-8")), constant


def test_every_target_is_explained():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    explained = set(re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, re.MULTILINE))
    parts = {"test-build", "bench-build", "zig", "matrix-wheel"}
    assert targets - explained == parts
    phony = set(re.findall(r"^\.PHONY: ([a-z-]+)", MAKEFILE, re.MULTILINE))
    assert phony == targets


def test_hooks_are_those_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repo,) = config["repos"]
    assert repo["repo"] == "local"  # nothing is downloaded
    lines = recipe("lint").replace("$(BIN)/", "").replace("$(MAKE)", "make")
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].removeprefix(".venv/bin/") in lines, hook["entry"]


def test_ci_runs_the_lints_and_the_tests():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for target in ("lint", "test-rust", "test"):
        assert re.search(rf"^make .*\b{target}$", script, re.MULTILINE), target
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_changelog_has_this_version():
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)[1] == version


def test_links_of_the_project_are_real():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project\.urls\]\n((?:.+\n)+)", pyproject, re.MULTILINE)[1]
    for address in re.findall(r'^\w+ = "(.*)"$', section, re.MULTILINE):
        assert address.startswith("https://")
        assert not re.search(r"example|placeholder|TODO|your-|localhost", address)


def test_make_gpu_runs_every_test_of_a_gpu():
    (folders,) = re.findall(r"^GPU_TESTS = (.*)$", MAKEFILE, re.MULTILINE)
    marked = [
        path.relative_to(ROOT)
        for path in (ROOT / "tests").rglob("*.py")
        if "pytest.mark." + "gpu" in path.read_text(encoding="utf-8")
    ]
    assert len(marked) > 3
    assert not [path for path in marked if not str(path).startswith(tuple(folders.split()))]
