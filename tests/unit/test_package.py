"""What is installed is what the package says of itself."""

import ast
import inspect
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

import oddsmith
from oddsmith import _core, torch_version

PACKAGE = Path(oddsmith.__file__).parent
# Imported only where the user has them and asks for them.
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
    assert requirements()["torch"] == f"=={torch_version.REQUIRED}.*"
    assert _core.TORCH_BUILD_VERSION.startswith(f"{torch_version.REQUIRED}.")


def test_every_import_is_a_requirement():
    modules = sorted(PACKAGE.glob("*.py"))
    assert len(modules) > 10
    imports = set().union(*map(imported_packages, modules)) - OPTIONAL
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
    constants = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    public = {name for name in dir(_core) if not name.startswith("__") or name == "__version__"}
    assert set(functions) | constants == public
    for name, node in functions.items():
        described = [argument.arg for argument in node.args.args]
        assert described == list(inspect.signature(getattr(_core, name)).parameters), name


@pytest.mark.parametrize("name", ["ORPOConfig", "ORPOTrainer", "functional"])
def test_public_names_are_documented(name):
    assert len(inspect.getdoc(getattr(oddsmith, name)).split()) > 5
