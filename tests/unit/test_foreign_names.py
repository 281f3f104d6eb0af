"""Only `integrations` sets or deletes attributes and items of what other libraries define."""

import ast
import re
from pathlib import Path

import pytest

import oddsmith

PACKAGE = Path(oddsmith.__file__).parent
# What is made for it: the environment of a process, and Python's hook for what it warns of.
MADE_FOR_IT = ("os.environ[", "warnings.showwarning")
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "integrations"]


def foreign_names(tree: ast.AST) -> set[str]:
    """Local names of modules, classes and functions that are not the package's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(each.asname or each.name).split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {each.asname or each.name for each in node.names}
    return found - {"oddsmith"}


def root(node: ast.expr) -> str | None:
    """The name at the start of `name.attribute[item].attribute`."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed(source: str) -> list[str]:
    """The expressions in a source that change what another library defines."""
    tree = ast.parse(source)
    foreign = foreign_names(tree)
    found = []
    for node in ast.walk(tree):
        target = None
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            target = None if isinstance(node.ctx, ast.Load) else node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            target = node.args[0] if node.func.id in ("setattr", "delattr") else None
        if target is not None and root(target) in foreign:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_foreign_is_changed(path):
    found = changed(path.read_text(encoding="utf-8"))
    assert not [each for each in found if not each.startswith(MADE_FOR_IT)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.nn.Linear.forward = f", ["torch.nn.Linear.forward"]),
        ("import torch.nn as nn\nnn.Linear.forward = f", ["nn.Linear.forward"]),
        ("from a.b import TABLE\nTABLE['x'] = f", ["TABLE['x']"]),
        ("from a.b import TABLE\ndel TABLE['x']", ["TABLE['x']"]),
        ("from a import B\nB.count += 1", ["B.count"]),
        ("from a import B\nsetattr(B, name, f)", ["setattr(B, name, f)"]),
        ("import os\nos.environ['A'] = '1'", ["os.environ['A']"]),
        ("from a import B\nb = B()\nb.count = 1", []),
        ("from .a import B\nB.count = 1", []),
    ],
)
def test_what_is_found(source, expected):
    assert changed(source) == expected


# What other rooms have no reason to name.
REACHES = re.compile(
    r"sys\.meta_path|AUTO_QUANTIZER|\.forward = |register_(full_)?(forward|backward)|"
    r"_attn_implementation\b|AttentionInterface|dispatch_default|install_pool|"
    r"_progress_bars?\(|set_verbosity|enable_input_require_grads|monkey"
)


def test_no_other_room_changes_other_libraries():
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in FILES
        for line in path.read_text(encoding="utf-8").splitlines()
        if REACHES.search(line)
    ]
    assert not found
