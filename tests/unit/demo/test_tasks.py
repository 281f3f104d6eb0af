"""The demo's pairs: correct and wrong answers, and no leak of held-out questions."""

import random

import pytest

from oddsmith.demo.tasks import TASKS, is_correct, make_pairs, make_splits, solve


@pytest.mark.parametrize(
    ("instruction", "right", "wrong"),
    [
        ('Repeat the word "SZY".', "SZY", "SYZ"),
        ('Write "HYOJA" once more.', "HYOJA", "HYOJ"),
        ('Spell "XJDKW" backwards.', "WKDJX", "XJDKW"),
        ("Sort these digits: 9 1 5.", "1 5 9", "9 5 1"),
        ("Put 7 3 6 0 in ascending order.", "0 3 6 7", "0367"),
        ("Which is larger, 93 or 79?", "93", "79"),
        # As text "9" > "10": numbers must be compared.
        ("Name the larger of 99 and 10.", "99", "10"),
        ("Add 58 and 4.", "62", "52"),
        ("What is 10 + 1?", "11", "101"),
        ('How many letters are in "QQYPQ"?', "5", "3"),
        ('Count the letters of "OK".', "2", "1"),
    ],
)
def test_answers_are_graded(instruction, right, wrong):
    assert solve(instruction) == right
    assert is_correct(instruction, f" {right}\n")
    assert not is_correct(instruction, wrong)
    assert not is_correct(instruction, "")


def test_an_unknown_instruction_is_refused():
    with pytest.raises(ValueError, match="'Reverse it' matches none"):
        is_correct("Reverse it", "ti")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_spoils_every_answer(task):
    rng = random.Random(7)
    for _ in range(500):
        values = task.draw(rng)
        right, wrong = task.solve(*values), task.spoil(rng, *values)
        assert wrong != right
        assert wrong.strip()
        for template in task.templates:
            instruction = template.format(**dict(zip("xy", values, strict=False)))
            assert solve(instruction) == right


def test_pairs_are_checkable_and_take_the_tasks_in_turn():
    rows = make_pairs(120, seed=3)
    assert [row["task"] for row in rows[: len(TASKS)]] == [task.name for task in TASKS]
    for row in rows:
        (question,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        assert (question["role"], chosen["role"], rejected["role"]) == (
            "user",
            "assistant",
            "assistant",
        )
        assert is_correct(question["content"], chosen["content"])
        assert not is_correct(question["content"], rejected["content"])


def test_the_seed_decides():
    assert make_pairs(60, seed=5) == make_pairs(60, seed=5)
    assert make_pairs(60, seed=5) != make_pairs(60, seed=6)


def test_no_held_out_question_is_trained_on_in_any_phrasing():
    train, test = make_splits(3000, 300, seed=11)
    assert len(train) == 3000
    assert len(test) == 300
    assert not {row["key"] for row in train} & {row["key"] for row in test}
    # `larger` and `add` have few questions: without the exclusion some would be in both.
    unguarded = {row["key"] for row in make_pairs(3000, seed=11)}
    assert unguarded & {row["key"] for row in test}
