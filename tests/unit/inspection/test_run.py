"""`oddsmith inspect`: its report, dropped rows and errors."""

import json

import pytest
from datasets import Dataset

from oddsmith import cli
from oddsmith.data.dataset import prepare_dataset
from oddsmith.data.notes import RowNotes
from oddsmith.data.rows import RowBuilder
from oddsmith.errors import UserError
from oddsmith.inspection.report import report_rows
from oddsmith.inspection.run import run_inspect
from support.word_tokenizer import bot, user

CLEAN = {"prompt": "a b c d e ", "chosen": "f g", "rejected": "h i"}


def prepare(rows, tokenizer, max_length=20, **kwargs):
    builder = RowBuilder(tokenizer, max_length)
    return prepare_dataset(Dataset.from_list(rows), tokenizer, builder.tokenize_row, **kwargs)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_inspect_says_what_the_trainer_says(folder, tokenizer, tmp_path, capsys):
    rows = [
        CLEAN,
        {**CLEAN, "rejected": CLEAN["chosen"]},
        {**CLEAN, "chosen": "f " * 30},
        {"prompt": "a b c d e", "chosen": "a b c d e f", "rejected": "a b c d e g"},
        {**CLEAN, "prompt": "q r s t u v "},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    report = run_inspect(source, folder, max_length=20, batch_size=3)
    trainer = report_rows(
        prepare(rows, tokenizer),
        tokenizer,
        max_length=20,
        name=source,
        batch_size=3,
        notes=RowNotes(overlength=1),
    )
    assert report.figures() == trainer.figures()
    shown = capsys.readouterr().out
    assert shown.startswith(str(trainer) + "\n")
    assert "1 rows truncated (max_length 20): 20.0%" in shown
    assert "! 1 of 5 rows have the prompt twice" in shown and "(first: row 3)" in shown
    assert "█" in shown


def test_inspect_drops_what_training_would_drop(folder, tmp_path):
    same = {**CLEAN, "rejected": CLEAN["chosen"]}
    rows = [CLEAN, {**CLEAN, "chosen": "f " * 30}, same]
    report = run_inspect(
        write(tmp_path / "rows.jsonl", rows), folder, max_length=20, overlength="drop"
    )
    figures = report.figures()
    assert figures["rows"] == 2
    assert figures["overlength"] == {"rows": 1, "policy": "drop"}
    assert figures["findings"]["identical"] == {"rows": 1, "first": 2}  # of the file


def test_inspect_as_a_command(folder, tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "rows.jsonl", [CLEAN] * 5)
    picture = tmp_path / "lengths.png"
    argv = ["inspect", source, "--model", folder, "--json", "--histogram", str(picture)]
    assert cli.main([*argv, "--max-length", "30", "--rows", "3"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["max_length"], figures["partial"]) == (3, 30, True)
    assert figures["repeated_prompts"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([CLEAN, {"prompt": "a", "chosen": "b"}], "line 2: no field rejected; its fields are"),
        ([CLEAN, {**CLEAN, "chosen": 7}], "line 2: chosen is 7 (int); must be a string"),
        ([CLEAN, [1]], "line 2: a list; must be a JSON object"),
        ([], "is empty"),
    ],
)
def test_inspect_names_bad_rows(rows, words, folder, tmp_path):
    with pytest.raises(UserError) as error:
        run_inspect(write(tmp_path / "rows.jsonl", rows), folder)
    assert words in str(error.value) and "rows.jsonl" in str(error.value)


def test_inspect_needs_a_tokenizer_and_sane_lengths(folder, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [CLEAN])
    with pytest.raises(UserError, match="--model /no/such: no such folder"):
        run_inspect(source, "/no/such")
    with pytest.raises(UserError, match="max_prompt_length is 30; must be positive and at most"):
        run_inspect(source, folder, max_length=20, max_prompt_length=30)
    with pytest.raises(UserError, match="--histogram x: needs a suffix"):
        run_inspect(source, folder, histogram="x")
    assert cli.main(["inspect", source, "--model", folder, "--max_length", "0"]) == 2
    assert "'0' is not a whole number above 0" in capsys.readouterr().err


def test_inspect_uses_the_templates_that_train_would(folder, tmp_path, capsys):
    turn = [{"role": "user", "content": "a b"}]
    rows = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "content": "d e"}],
        }
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    # <s> [INST] a b [/INST] and c, d e, </s>; separate words, because the tokenizer knows no
    # others.
    report = run_inspect(source, folder)
    assert report.figures()["rows"] == 1
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}")
    figures = run_inspect(source, folder, chat_template=str(template)).figures()
    assert [figures["tokens"][side]["max"] for side in ("prompt", "chosen", "rejected")] == [
        3,
        2,
        3,
    ]


def test_inspect_reads_images_beside_columns_of_other_names(tmp_path, capsys):
    pytest.importorskip("PIL", reason="rows with images need Pillow")
    from support.image_models import image_model, picture

    model, processor = image_model("llava")
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture(1).save(tmp_path / "a.png")
    row = {"chosen": [bot("c")], "rejected": [bot("d")], "image": str(tmp_path / "a.png")}
    found = []
    for name, argv in (
        ("prompt", []),
        ("question", []),
        ("frage", ["--prompt_column", "frage"]),
        ("q", ["--column_mapping", '{"q": "prompt"}']),
    ):
        source = write(tmp_path / "rows.jsonl", [{**row, name: [user("ab")]}] * 3)
        command = ["inspect", source, "--model", str(tmp_path / "model"), "--json", *argv]
        assert cli.main(command) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["images"] == {"rows": 3, "images": 3} and found[0]["unused_columns"] == []
    assert all(figures == found[0] for figures in found)
