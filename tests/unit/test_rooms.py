"""Every module has a test file of its name in its folder, or is listed in the table below."""

import ast
from pathlib import Path

import oddsmith
from support.paths import ROOT

PACKAGE = Path(oddsmith.__file__).parent
TESTS = ROOT / "tests"
LONGEST = 450

# Module -> the test file that covers it, and why it has no test file of its name.
ELSEWHERE = {
    "training/trainer_parts.py": (
        "unit/test_private_names.py",
        "declarations for the type checker, which say what the trainer's parts may reach",
    ),
    "training/shared_rows.py": (
        "e2e/test_shared_rows.py",
        "it needs two processes",
    ),
    "training/stop_hooks.py": (
        "e2e/test_stop.py",
        "whole runs are stopped, with one process and with two",
    ),
    "checkpoint/rules.py": (
        "unit/checkpoint/test_write.py",
        "dataclasses without code: the compiled core reads them",
    ),
    "integrations/head_probe.py": (
        "unit/integrations/test_model_head.py",
        "its answer decides where the loss is computed",
    ),
    "integrations/checkpointing.py": (
        "unit/training/test_model_loan.py",
        "what it takes off is what a run leaves",
    ),
    "integrations/module_forward.py": (
        "unit/integrations/test_model_head.py",
        "the head's forward is the one that it is for",
    ),
    "integrations/parameter_count.py": (
        "unit/integrations/test_transformers_quantizer.py",
        "it counts what the quantizer has loaded",
    ),
    "integrations/quantizer_table.py": (
        "unit/integrations/test_nf4_config.py",
        "a configuration decides what the table returns",
    ),
    "integrations/model_weights.py": (
        "unit/checkpoint/test_quantize.py",
        "its answer is which tensors of a checkpoint are quantised",
    ),
    "check/kernels.py": (
        "cuda/test_self_test.py",
        "what it decides shows in the kernels that are used",
    ),
    "check/trial_process.py": (
        "cuda/test_self_test.py",
        "it is there for kernels that end their process",
    ),
    "check/verdicts.py": (
        "cuda/test_self_test.py",
        "they are kept for the next process",
    ),
    "head/arguments.py": (
        "unit/head/test_ops.py",
        "named tuples without code: the compiled core reads them",
    ),
    "optim/adamw/arguments.py": (
        "unit/optim/adamw/test_step.py",
        "named tuples without code: the compiled core reads them",
    ),
    "optim/adamw/docs.py": (
        "unit/test_package.py",
        "parts of docstrings that several classes share",
    ),
}


def file_for(module: Path) -> Path:
    return TESTS / "unit" / module.parent / f"test_{module.name}"


def has_tests(path: Path) -> bool:
    names = (
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    )
    return any(name.startswith("test_") for name in names)


def modules() -> list[Path]:
    """Of the package, without the files that only re-export."""
    found = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    return [path for path in found if path.name not in ("__init__.py", "__main__.py")]


def test_every_module_has_a_test_file_of_its_name():
    wanted = [path for path in modules() if path.as_posix() not in ELSEWHERE]
    assert len(wanted) > 80
    missing = [str(path) for path in wanted if not file_for(path).is_file()]
    assert not missing
    empty = [str(path) for path in wanted if not has_tests(file_for(path))]
    assert not empty


def test_the_table_is_not_stale():
    known = {path.as_posix() for path in modules()}
    for module, (file, reason) in ELSEWHERE.items():
        assert module in known, f"{module} is gone"
        assert not file_for(Path(module)).exists(), f"{module} has a test file of its own"
        assert has_tests(TESTS / file), f"{file} has no tests"
        assert len(reason.split()) > 3


def test_rooms_of_tests_are_rooms_of_the_package():
    for file in sorted((TESTS / "unit").rglob("test_*.py")):
        room = file.relative_to(TESTS / "unit").parent
        module = PACKAGE / room / file.name.removeprefix("test_")
        # Tests of the package: import, installation, layout.
        assert module.is_file() or room == Path("."), f"{file} tests no module"


def test_files_are_short():
    folders = [
        PACKAGE,
        *(ROOT / name for name in ("tests", "benches", "examples", "src", "kernels")),
    ]
    files = [
        path for folder in folders for suffix in ("py", "rs", "cu", "cuh", "h", "cpp")
        for path in folder.rglob(f"*.{suffix}")
    ]  # fmt: skip
    assert len(files) > 300
    long = {}
    for path in files:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > LONGEST:
            long[str(path)] = lines
    assert not long
