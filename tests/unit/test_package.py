"""The installed package matches its metadata."""

import ast
import importlib
import inspect
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

import oddsmith
from oddsmith import _core, torch_version
from support.wheel import faults_of_library

PACKAGE = Path(oddsmith.__file__).parent
# All modules at any depth, so that a moved module is still tested.
MODULES = sorted(PACKAGE.rglob("*.py"))
# Optional dependencies.
OPTIONAL = {"flash_attn", "wandb", "comet_ml"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, str]:
    """The names that `pip install oddsmith` brings, each with its versions."""
    lines = [line for line in metadata.requires("oddsmith") if "extra ==" not in line]
    split = [re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups() for line in lines]
    return {canonical(name): versions for name, versions in split}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def brought_along(names: set[str]) -> set[str]:
    """`names` and what they require without extras, all the way down."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        lines = [line for line in lines if "extra ==" not in line]
        waiting |= {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines} - found
    return found


def test_version():
    assert metadata.version("oddsmith") == oddsmith.__version__ == _core.__version__


def test_the_required_torch_is_the_one_of_the_check():
    oldest = ".".join(map(str, torch_version.OLDEST))
    assert requirements()["torch"] == f">={oldest}"


def test_the_core_needs_nothing_of_torch_or_python():
    """What it takes of libtorch it looks up in the one that is loaded."""
    faults = [fault for fault in faults_of_library(Path(_core.__file__)) if "glibc" not in fault]
    assert not faults


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_walk_reaches_every_folder():
    folders = {path.parent for path in MODULES}
    # The configurations are files of accelerate.
    others = ("__pycache__", "accelerate_configs")
    found = {path for path in PACKAGE.rglob("*") if path.is_dir() and path.name not in others}
    assert folders == found | {PACKAGE}
    assert len(MODULES) > 80


def test_every_folder_with_code_is_a_package():
    assert {path.parent for path in MODULES} == {
        path.parent for path in MODULES if path.name == "__init__.py"
    }


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_says_what_it_is_and_has_the_names_it_lists(path):
    module = importlib.import_module(module_name(path))
    assert len((module.__doc__ or "").split()) > 2
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed)
    assert not [name for name in listed if not hasattr(module, name)]


def test_every_import_is_a_requirement():
    imports = set().union(*map(imported_packages, MODULES)) - OPTIONAL
    distributions = metadata.packages_distributions()
    installed = brought_along(set(requirements()))
    missing = {
        name
        for name in imports
        if not {canonical(each) for each in distributions.get(name, [name])} & installed
    }
    assert not missing


def test_console_script():
    (script,) = [
        entry
        for entry in metadata.entry_points(group="console_scripts")
        if entry.name == "oddsmith"
    ]
    from oddsmith import cli

    assert script.load() is cli.main


def test_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_stub_describes_the_core():
    tree = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    # What starts with an underscore are dictionaries that functions return.
    classes = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    constants = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    public = {name for name in dir(_core) if not name.startswith("__") or name == "__version__"}
    assert set(functions) | set(classes) | constants == public
    owned = [(_core, node) for node in functions.values()]
    for name, node in classes.items():
        methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
        owned += [(getattr(_core, name), method) for method in methods]
    for owner, node in owned:
        described = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        # The signature of __new__ is that of the class.
        known = owner if node.name == "__new__" else getattr(owner, node.name)
        skipped = 1 if node.name == "__new__" else 0
        assert described[skipped:] == list(inspect.signature(known).parameters), node.name


@pytest.mark.parametrize("name", ["ORPOConfig", "ORPOTrainer", "functional"])
def test_public_names_are_documented(name):
    assert len(inspect.getdoc(getattr(oddsmith, name)).split()) > 5
