"""A name with an underscore is used in the file that defines it, or below a class that has it."""

import ast
import importlib.util
from pathlib import Path

import pytest

import oddsmith

PACKAGE = Path(oddsmith.__file__).parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in ("_", "_core")


class Module:
    """What a file imports from the package, and the private names that it defines."""

    def __init__(self, path: Path, root: Path):
        parts = path.relative_to(root.parent).with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.package = ".".join(parts[:-1])
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.imported: dict[str, tuple[str, str]] = {}  # local name: module, name in it
        self.defined: set[str] = set()
        self.bases: set[str] = set()
        for node in ast.walk(self.tree):
            self._visit(node)

    def _visit(self, node: ast.AST) -> None:
        match node:
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                module = importlib.util.resolve_name(module, self.package)
                if module.split(".")[0] == "oddsmith":
                    for each in node.names:
                        self.imported[each.asname or each.name] = (module, each.name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                self.defined.add(name)
            case ast.ClassDef():
                self.defined.add(node.name)
                self.bases |= {base.id for base in node.bases if isinstance(base, ast.Name)}
                for each in node.body:  # slots, and fields of a dataclass
                    targets = each.targets if isinstance(each, ast.Assign) else []
                    targets += [each.target] if isinstance(each, ast.AnnAssign) else []
                    self.defined |= {at.id for at in targets if isinstance(at, ast.Name)}
            case ast.Attribute(value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                self.defined.add(node.attr)

    def inherited(self, modules: dict[str, "Module"]) -> set[str]:
        """Names of this file and of those that its classes have their bases from."""
        names = set(self.defined)
        for base in self.bases & self.imported.keys():
            origin = modules.get(self.imported[base][0])
            names |= origin.inherited(modules) if origin is not None else set()
        return names


def is_own(value: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def reached(module: Module, modules: dict[str, Module]) -> list[str]:
    """The private names of other files that a file uses."""
    found = [
        f"{module.name}: {name} of {origin}"
        for origin, name in module.imported.values()
        if is_private(name)
    ]
    elsewhere = set().union(*(each.defined for each in modules.values() if each is not module))
    inherited = module.inherited(modules)
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        known = inherited if is_own(node.value) else module.defined
        local = node.value.id if isinstance(node.value, ast.Name) else None
        origin = ".".join(module.imported.get(local, ()))
        if origin in modules or (node.attr in elsewhere and node.attr not in known):
            found.append(f"{module.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def read(root: Path) -> dict[str, Module]:
    made = [Module(path, root) for path in sorted(root.rglob("*.py"))]
    return {module.name: module for module in made}


MODULES = read(PACKAGE)


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_is_reached_across_files(name):
    assert not reached(MODULES[name], MODULES)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from .a import _hidden", "oddsmith.b: _hidden of oddsmith.a"),
        ("from . import a\na._hidden()", "oddsmith.b:2: a._hidden"),
        ("def f(thing): thing._method()", "oddsmith.b:1: thing._method"),
        ("def f(thing): thing.part._field = 1", "oddsmith.b:1: thing.part._field"),
        ("class B:\n def f(self): self._method()", "oddsmith.b:2: self._method"),
        ("from .a import A\nclass B(A):\n def f(self): self._method()", None),
        ("from .a import A\nclass B(A):\n def f(self): super()._method()", None),
        ("class B:\n _method = 1\ndef f(b): return b._method", None),
        ("import torch\ntorch._hidden_elsewhere()", None),
    ],
)
def test_what_is_found(line, expected, tmp_path):
    root = tmp_path / "oddsmith"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "a.py").write_text(
        "def _hidden(): ...\nclass A:\n def __init__(self): self._field = 0\n def _method(self): ...\n"
    )
    (root / "b.py").write_text(line)
    modules = read(root)
    assert reached(modules["oddsmith.b"], modules) == ([] if expected is None else [expected])
