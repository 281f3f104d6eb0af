"""The Python of README.md and docs/ runs, each block by itself, on small local models and data."""

import pytest
import torch

from support.markdown import PAGES, blocks, page_id

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]

CODE = [
    pytest.param(page, code, id=f"{page_id(page)}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]


def test_there_are_examples():
    assert len(CODE) >= 8


@pytest.mark.parametrize(("page", "code"), CODE)
def test_runs(page, code, localized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(localized(code), str(page), "exec"), names)
    if "trainer" in names:
        state = names["trainer"].state
        assert state.global_step == state.max_steps == names["trainer"].args.max_steps
    if "result" in names:
        assert torch.isfinite(names["hidden"].grad).all()
        assert names["weight"].grad.abs().sum() > 0
    if "datasets" in names:
        check_rows(names["datasets"], localized)


def check_rows(datasets, localized):
    """All forms of the same pair become the same tokens but for the chat template."""
    from transformers import AutoTokenizer

    from oddsmith.data.dataset import prepare_dataset
    from oddsmith.data.rows import RowBuilder

    tokenizer = AutoTokenizer.from_pretrained(localized("HuggingFaceTB/SmolLM2-135M-Instruct"))
    builder = RowBuilder(tokenizer)
    text, conversation, implicit = (
        prepare_dataset(each, tokenizer, builder.tokenize_row)[0] for each in datasets
    )
    assert conversation["chosen_input_ids"] == implicit["chosen_input_ids"]
    assert len(text["chosen_input_ids"]) < len(conversation["chosen_input_ids"])


def test_the_readme_is_short():
    """Of about 200 lines, and QLoRA in about 25."""
    page = PAGES[0]
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 220
    assert any(
        "NF4Config" in code and ".generate(" in code and len(code.splitlines()) <= 25
        for code in blocks(page, "python")
    )
