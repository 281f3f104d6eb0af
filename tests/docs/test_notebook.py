"""examples/orpo_quickstart.ipynb runs from top to bottom, and is committed without outputs."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="of the test extra: pip install '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="of the test extra: pip install '.[test]'")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "orpo_quickstart.ipynb"

# The kernel is a separate process; jupyter's warnings are about its files and sockets.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def execute(folder: Path, **cells: str) -> dict[str, str]:
    """Runs the notebook in `folder` with other text in the cells of these tags; returns what each cell printed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            cell.source = cells.pop(tag, cell.source)
    assert not cells, f"the notebook has no cell tagged {', '.join(cells)}"
    client = nbclient.NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return {
        cell.source: "".join(
            output.text
            for output in cell.outputs
            if output.output_type == "stream" and output.name == "stdout"
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def printed(outputs: dict[str, str], part: str) -> str:
    (text,) = (text for source, text in outputs.items() if part in source)
    return text


def test_outputs_are_stripped():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_it_runs(tmp_path):
    outputs = execute(tmp_path, size="steps, train_count, test_count = 6, 600, 24")
    assert "M parameters" in printed(outputs, "build_model(tokenizer)")
    assert "of 12 are right" in printed(outputs, "model.generate(")
    assert (tmp_path / "orpo-quickstart" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_model_learns(tmp_path):
    """All of its steps: three minutes."""
    outputs = execute(tmp_path)
    answers = printed(outputs, "model.generate(")
    right = int(answers.splitlines()[-1].split()[0])
    # The model learns the four tasks of sorting and counting first, and completely.
    assert right >= 4, answers


def test_the_two_lines_for_another_model(pairs_folder, instruct_folder, tmp_path):
    lines = f"model_id = {str(instruct_folder)!r}\ndataset_id = {str(pairs_folder)!r}"
    outputs = execute(tmp_path, model=lines, size="steps = 2")
    assert "M parameters" in printed(outputs, "build_model(tokenizer)")
    assert printed(outputs, "model.generate(").count("(chosen: ") == 3
    assert (tmp_path / "orpo-quickstart" / "adapter_config.json").is_file()
