"""Scored and ranked answers under the names that public datasets have."""

import pytest

from oddsmith.prepare.answer_columns import describe, find_columns
from oddsmith.prepare.pair import assistant, user
from oddsmith.prepare.scored import Columns
from support.prepared_units import pairs_of

ASKED, GOOD, POOR = "What is 2 + 2?", "Four.", "Five."
PAIR = ([user(ASKED)], [assistant(GOOD)], [assistant(POOR)])

ROWS = {
    "Nectar": [{"prompt": ASKED, "answers": [{"answer": POOR, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]}],
    "stack-exchange-preferences": [
        {"question": ASKED, "answers": [{"text": POOR, "pm_score": 0}, {"text": GOOD, "pm_score": 4}]}
    ],
    "distilabel": [{"instruction": ASKED, "generations": [POOR, GOOD], "ratings": [1, 5]}],
    "distilabel, older": [{"input": ASKED, "generations": [POOR, GOOD], "rating": ["1", "5"]}],
    "Snorkel": [{"prompt": ASKED, "all_generated_responses": [POOR, GOOD], "all_rm_scores": [-1.5, 2.0]}],
    "HelpSteer": [
        {"prompt": ASKED, "response": POOR, "helpfulness": 1},
        {"prompt": ASKED, "response": GOOD, "helpfulness": 4},
    ],
    "KTO": [
        {"prompt": ASKED, "completion": POOR, "label": False},
        {"prompt": ASKED, "completion": GOOD, "label": True},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_best_and_the_worst_answer(name):
    kind, units = pairs_of(ROWS[name])
    assert kind == ("responses" if len(ROWS[name]) > 1 else "scored")
    assert units == [[PAIR]]


def test_what_was_taken_for_what():
    found = [find_columns(rows[0], Columns()) for rows in ROWS.values()]
    assert describe(found[0]) == "prompt is the prompt, answers.answer the answers, rank the ranks"
    assert (
        describe(found[5]) == "prompt is the prompt, response the answers, helpfulness the scores"
    )


def test_columns_that_are_something_else():
    assert find_columns({"prompt": ASKED, "answers": ["a", "b"]}, Columns()) is None
    assert find_columns({"generations": ["a"], "ratings": [1]}, Columns()) is None  # no prompt
    assert find_columns({"prompt": ASKED, "generations": ["a"], "ratings": 3}, Columns()) is None
