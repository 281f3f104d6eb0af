"""Two answers and a verdict, as public datasets have them."""

import pytest

from oddsmith.prepare.comparisons import COMPARISONS, find_comparison, parse_comparison
from oddsmith.prepare.pair import BadRow, assistant, user
from support.prepared_units import bad, pairs_of

ASKED, GOOD, POOR = "What is 2 + 2?", "Four.", "Five."
PAIR = ([user(ASKED)], [assistant(GOOD)], [assistant(POOR)])
TALK = [user("Hi"), assistant("Hello"), user(ASKED)]

ROWS = {
    "Stanford Human Preferences": [
        {"history": ASKED, "human_ref_A": GOOD, "human_ref_B": POOR, "labels": 1},
        {"history": ASKED, "human_ref_A": POOR, "human_ref_B": GOOD, "labels": 0},
    ],
    "PKU-SafeRLHF": [
        {"prompt": ASKED, "response_0": GOOD, "response_1": POOR, "better_response_id": 0},
        {"prompt": ASKED, "response_0": POOR, "response_1": GOOD, "better_response_id": 1},
    ],
    "AlpacaFarm": [
        {"instruction": ASKED, "input": "", "output_1": GOOD, "output_2": POOR, "preference": 1},
        {"instruction": ASKED, "output_1": POOR, "output_2": GOOD, "preference": 2},
    ],
    "WebGPT": [
        {"question": {"full_text": ASKED}, "answer_0": GOOD, "answer_1": POOR, "score_0": 0.5,
         "score_1": -0.5},
        {"question": {"full_text": ASKED}, "answer_0": POOR, "answer_1": GOOD, "score_0": -1.0,
         "score_1": 1.0},
    ],
    "HelpSteer3": [
        {"context": [user(ASKED)], "response1": GOOD, "response2": POOR, "overall_preference": -2},
        {"context": [user(ASKED)], "response1": POOR, "response2": GOOD, "overall_preference": 1},
    ],
    "Chatbot Arena": [
        {"conversation_a": [user(ASKED), assistant(GOOD)],
         "conversation_b": [user(ASKED), assistant(POOR)], "winner": "model_a"},
        {"conversation_a": [user(ASKED), assistant(POOR)],
         "conversation_b": [user(ASKED), assistant(GOOD)], "winner": "model_b"},
    ],
    "Chatbot Arena, in columns": [
        {"prompt": f'["{ASKED}"]', "response_a": f'["{GOOD}"]', "response_b": f'["{POOR}"]',
         "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        {"prompt": f'["{ASKED}"]', "response_a": f'["{POOR}"]', "response_b": f'["{GOOD}"]',
         "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
    ],
    "OpenAI's summaries": [
        {"info": {"post": ASKED, "title": None}, "choice": 0,
         "summaries": [{"text": GOOD}, {"text": POOR}]},
        {"info": {"post": ASKED}, "choice": 1, "summaries": [{"text": POOR}, {"text": GOOD}]},
    ],
}  # fmt: skip


def test_each_format_has_its_rows():
    assert list(ROWS) == [kind.name for kind in COMPARISONS]


@pytest.mark.parametrize("name", ROWS)
def test_the_better_answer_is_chosen(name):
    for row in ROWS[name]:
        found = find_comparison(row)
        assert found is not None and found.name == name
    kind, units = pairs_of(ROWS[name])
    assert kind == "comparisons" and units == [[PAIR], [PAIR]]


def test_ties_are_no_pairs():
    ties = [
        {**ROWS["Chatbot Arena"][0], "winner": "tie (bothbad)"},
        {**ROWS["WebGPT"][0], "score_1": 0.5},
        {**ROWS["HelpSteer3"][0], "overall_preference": 0},
    ]
    for row in ties:
        assert pairs_of([row])[1] == ["answers equally good"]


def test_the_verdict_is_the_order_and_the_scores_are_kept():
    row = {**ROWS["Stanford Human Preferences"][1], "score_A": 7, "score_B": 3}
    (pair,) = parse_comparison(row)
    assert (pair.score_chosen, pair.score_rejected, pair.ranked) == (3, 7, True)


def test_conversations():
    row = {"context": TALK, "response1": GOOD, "response2": POOR, "overall_preference": -1}
    assert pairs_of([row])[1] == [[(TALK, *PAIR[1:])]]
    turns = {
        "prompt": f'["Hi", "{ASKED}"]',
        "response_a": f'["Hello", "{GOOD}"]',
        "response_b": f'["Hello", "{POOR}"]',
        "winner_model_a": 1,
        "winner_model_b": 0,
    }
    assert pairs_of([turns])[1] == [[(TALK, *PAIR[1:])]]
    titled = {**ROWS["OpenAI's summaries"][0], "info": {"post": ASKED, "title": "Sums"}}
    assert pairs_of([titled])[1][0][0][0] == [user(f"Sums\n\n{ASKED}")]


def test_bad_rows():
    assert "summaries is [] (list); must be a list of two" in bad(
        {**ROWS["OpenAI's summaries"][0], "summaries": []}
    )
    assert "must have full_text, post or article" in bad({**ROWS["WebGPT"][0], "question": {}})
    with pytest.raises(BadRow, match="no known comparison has the fields a"):
        parse_comparison({"a": 1})
