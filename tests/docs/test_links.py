"""Links of README.md and docs/ lead somewhere, and every page is linked from the README."""

import re
from pathlib import Path

import pytest

from support.markdown import PAGES, page_id, prose
from support.paths import ROOT

LINKS = [
    pytest.param(page, target, id=f"{page_id(page)}-{target}")
    for page in PAGES
    for target in dict.fromkeys(re.findall(r"\]\(([^)\s]+)\)", prose(page)))
    if not target.startswith("http")
]


def anchors(text: str) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists()
    if anchor:
        assert anchor in anchors(file.read_text(encoding="utf-8"))


def test_every_page_is_linked_from_the_readme():
    readme = PAGES[0].read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"]({page_id(page)})" in readme, page_id(page)


@pytest.mark.parametrize("page", [pytest.param(page, id=page_id(page)) for page in PAGES])
def test_one_name_for_one_thing(page):
    text = prose(page).replace("model card", "")
    for word, instead in (("cards?", "GPU"), ("pads", "padding"), ("words seen", "tokens")):
        assert not re.search(rf"\b{word}\b", text, re.IGNORECASE), instead


@pytest.mark.parametrize("folder", ["python", "src", "kernels", "tests", "benches", "examples"])
def test_code_has_the_same_names(folder):
    files = [
        path
        for suffix in ("py", "rs", "cu", "cuh", "h", "cpp")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
        if path != Path(__file__)
    ]
    assert files
    for path in files:
        text = re.sub(r"model[ _]card", "", path.read_text(encoding="utf-8"), flags=re.IGNORECASE)
        for word, instead in (("cards?", "GPU"), ("anew", "again"), ("likewise", "what is meant")):
            found = re.search(rf"\b{word}\b", text, re.IGNORECASE)
            assert not found, f"{path}: {word}; use {instead}"
