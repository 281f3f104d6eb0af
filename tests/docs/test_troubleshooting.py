"""The messages that docs/troubleshooting.md explains are messages of the code."""

import ast
import re

import pytest

from support.markdown import blocks
from support.paths import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = [message.strip() for message in blocks(PAGE, "text")]
# What stands for a part that varies, in a template.
HOLE = "\0"


def python_templates() -> list[str]:
    """Every text in the package, with a hole for each value that is put into it."""
    found = []
    for path in (ROOT / "python" / "oddsmith").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, (ast.JoinedStr, ast.BinOp)):
                found.append(template(node))
    return found


def template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return HOLE


def rust_text() -> str:
    """The sources of the core, with the texts that go over several lines in one."""
    files = (ROOT / "src").rglob("*.rs")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r"\\\n\s*", "", text)


TEMPLATES = [*python_templates(), rust_text()]


def test_there_are_messages():
    assert len(MESSAGES) >= 25
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_so(message):
    parts = [re.escape(part) for part in message.split("...") if part.strip()]
    assert max(map(len, parts)) > 12, "too short to tell messages apart"
    pattern = re.compile(r"[^\n]*?".join(parts))
    assert any(pattern.search(template) for template in TEMPLATES), message


def test_a_message_that_nobody_writes_is_found():
    assert not any("none of the code says this" in template for template in TEMPLATES)
    assert template(ast.parse("f'{x} is {y!r}; must be z'").body[0].value) == "\0 is \0; must be z"
