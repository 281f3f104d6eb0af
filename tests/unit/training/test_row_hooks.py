"""The rows of a run: overridden hooks, checks, the report."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from oddsmith import ORPOTrainer
from oddsmith.inspection.report import FIGURES
from oddsmith.training.row_hooks import RowHooks
from support.trainer_runs import pairs


def test_rows_go_through_an_overridden_hook(make):
    class Marked(ORPOTrainer):
        def build_tokenized_answer(self, prompt, answer):
            side = super().build_tokenized_answer(prompt, answer)
            return {**side, "input_ids": [17, *side["input_ids"][1:]]}

    trainer = make(kind=Marked)
    for row in trainer.train_dataset:
        first = next(label for label in row["chosen_labels"] if label >= 0)
        assert first == 17


def test_tokenize_row_is_what_the_dataset_holds(make):
    trainer = make()
    row = trainer.train_dataset[2]
    made = trainer.tokenize_row({key: row[key] for key in ("prompt", "chosen", "rejected")})
    assert made == {key: row[key] for key in made}


def test_lints_are_logged(make, caplog):
    row = {"prompt": "What is it?", "chosen": "The same.", "rejected": "The same."}
    make(train_dataset=Dataset.from_list([row, row]))
    assert "2 of 2 rows have the same chosen and rejected completion" in caplog.text


def test_dataset_dicts(make):
    parts = {"a": pairs(3, seed=5), "b": pairs(4, seed=6)}
    for given in (parts, DatasetDict(parts)):
        trainer = make(eval_dataset=given)
        assert isinstance(trainer.eval_dataset, dict)
        assert {k: len(v) for k, v in trainer.eval_dataset.items()} == {"a": 3, "b": 4}
        assert "chosen_labels" in trainer.eval_dataset["b"].column_names


def test_evaluation_rows_get_the_same_checks(make, caplog):
    row = {"prompt": "What is it?", "chosen": "The same.", "rejected": "The same."}
    make(eval_dataset={"x": Dataset.from_list([row, row])})
    assert "eval_dataset['x']: 2 of 2 rows have the same chosen and rejected" in caplog.text


def test_columns_of_other_names(make, caplog):
    rows = pairs(3)
    renamed = rows.rename_column("prompt", "frage")
    expected = make(train_dataset=rows).train_dataset.to_list()
    for config in ({"prompt_column": "frage"}, {"column_mapping": '{"frage": "prompt"}'}):
        assert make(train_dataset=renamed, config=config).train_dataset.to_list() == expected
    assert (
        make(train_dataset=rows.rename_column("prompt", "question")).train_dataset.to_list()
        == expected
    )
    assert (
        "train_dataset: question is the prompt; column_mapping names other columns" in caplog.text
    )


def test_other_names_of_columns_make_the_rows_again(make):
    rows = pairs(3).add_column("second", ["What else is it? "] * 3)
    trainer = make(train_dataset=rows, eval_dataset=rows)
    trainer.args.prompt_column = "second"
    trainer.evaluate()
    assert trainer.train_dataset["prompt"][:] == ["What else is it? "] * 3


def test_rows_with_images_are_reported_like_others(make, caplog):
    pytest.importorskip("PIL", reason="rows with images need Pillow")
    from support.image_models import image_model, image_pairs

    model, processor = image_model("llava")
    shown, handler = [], logging.Handler()
    handler.emit = shown.append
    FIGURES.addHandler(handler)
    rows = image_pairs(4)
    same = rows.map(lambda row: {"rejected": row["chosen"]})
    try:
        make(
            model=model,
            processing_class=processor,
            train_dataset=rows,
            eval_dataset={"x": same},
            config={"log_level": "info"},
        )
    finally:
        FIGURES.removeHandler(handler)
        FIGURES.setLevel(logging.NOTSET)
    (record,) = shown
    lines = record.getMessage().splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
        "train_dataset",
        "eval_dataset['x']",
    ]
    assert sum("images: 4 in 3 of 4 rows" in line for line in lines) == 2
    assert "eval_dataset['x']: 4 of 4 rows have the same chosen and rejected" in caplog.text
    assert not any("images: 4" in each.getMessage() for each in caplog.records if each.levelno > 20)


def test_processes_that_share_a_vision_part_need_an_image():
    rows = Dataset.from_dict({"prompt": ["a", "b"], "images": [[], []]})
    hooks = SimpleNamespace(_image_rows=None, aux_loss_enabled=False)
    for part in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="none of the first 1000 has one.*shuffle the rows"):
            RowHooks._image_filler(hooks, [part])
