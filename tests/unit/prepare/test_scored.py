"""Rows of several answers, with the expected pairs."""

from oddsmith.prepare.pair import assistant, user
from oddsmith.prepare.scored import draw_pairs
from support.prepared_units import TALK, bad, read


def rated(text, fine=None, overall=None, **ratings):
    return {
        "response": text,
        "fine-grained_score": fine,
        "overall_score": overall,
        "annotations": {
            name: {"Rating": value, "Rationale": ""} for name, value in ratings.items()
        },
    }


def test_ultrafeedback():
    row = {
        "instruction": "Tea?",
        "source": "x",
        "completions": [
            rated("fair", 3.0, 9, honesty="3", truthfulness="3"),
            rated("best", 4.5, 1, honesty="5", truthfulness="4"),
            rated("worst", 2.0, 10, honesty="1", truthfulness="N/A"),
            rated("unrated"),
        ],
    }
    kind, units = read([row])
    assert kind == "ultrafeedback"
    (pair,) = next(units).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        [user("Tea?")],
        [assistant("best")],
        [assistant("worst")],
    )
    assert (pair.score_chosen, pair.score_rejected, pair.votes) == (4.5, 2.0, (1, 0))
    _, units = read([row], pairing="all")
    sides = [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in next(units).pairs]
    assert sides == [("best", "fair"), ("best", "worst"), ("fair", "worst")]


def test_ultrafeedback_scores_that_are_missing():
    by_aspect = [rated("a", None, 1, honesty="5", helpfulness="4"),
                 rated("b", None, 9, honesty="2", helpfulness="5")]  # fmt: skip
    overall = [rated("a", None, 7.5), rated("b", None, 6)]
    rows = [
        {"instruction": "q", "completions": by_aspect},
        {"instruction": "r", "completions": overall},
        {"instruction": "s", "completions": overall[:1]},
        {"instruction": "t", "completions": overall[:1] * 2},
        {"instruction": "", "completions": overall},
    ]
    _, units = read(rows)
    units = list(units)
    (first,) = units[0].pairs
    assert (first.score_chosen, first.score_rejected, first.votes) == (4.5, 3.5, (1, 1))
    (second,) = units[1].pairs
    assert (second.score_chosen, second.score_rejected, second.votes) == (7.5, 6.0, None)
    assert [unit.reason for unit in units[2:]] == [
        "fewer than two answers",
        "answers equally good",
        "no prompt",
    ]
    assert "field completions[0].response is None" in bad({"instruction": "q", "completions": [{}]})
    assert "field completions is 'x'" in bad({"instruction": "q", "completions": "x"})


def test_drawing_pairs():
    orders = [2.0, 9.0, 5.0, 9.0]
    assert draw_pairs(orders, "best_worst", "q") == [(1, 0)]
    assert draw_pairs(orders, "all", "q") == [(1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]
    random = [draw_pairs(orders, "best_random", f"q{seed}") for seed in range(60)]
    drawn = {pairs[0][1] if pairs else None for pairs in random}
    assert drawn == {0, 2, None}  # None: the other best one
    assert draw_pairs(orders, "best_random", "q7") == draw_pairs(orders, "best_random", "q7")
    for pairing in ("best_worst", "best_random", "all"):
        assert draw_pairs([1.0, 1.0], pairing, "q") == draw_pairs([1.0], pairing, "q") == []


def test_scored_columns():
    rows = [
        {"question": "Tea?", "answers": ["a", "b", "c"], "marks": [1, 5, 3]},
        {"question": TALK, "answers": ["a", "b", "c"], "marks": [[1, 2], [5, 1], [9, None]]},
    ]
    columns = {"prompt": "question", "responses": "answers", "scores": "marks"}
    kind, units = read(rows, columns=columns)
    assert kind == "scored"
    pairs = [unit.pairs[0] for unit in units]
    assert [(p.chosen[0]["content"], p.rejected[0]["content"], p.votes) for p in pairs] == [
        ("b", "a", None),
        ("c", "a", (1, 0)),
    ]
    assert pairs[1].prompt == TALK
    assert (pairs[1].score_chosen, pairs[1].score_rejected) == (9.0, 1.5)


def test_ranked_columns_and_objects():
    columns = {"responses": "answers", "ranks": "places"}
    row = {"prompt": "q", "answers": ["a", "b"], "places": [2, 1]}
    _, units = read([row], columns=columns)
    (pair,) = next(units).pairs
    assert (pair.chosen, pair.ranked, pair.score_chosen) == ([assistant("b")], True, None)
    objects = {"prompt": "q", "answers": [{"t": "a", "r": 3, "s": 0.5}, {"t": "b", "r": 1, "s": 0.1},
                                          {"t": "c", "r": None, "s": None}]}  # fmt: skip
    keys = {"responses": "answers", "text_key": "t"}
    for more, expected in (({"score_key": "s"}, "a"), ({"rank_key": "r"}, "b")):
        _, units = read([objects], columns={**keys, **more})
        assert next(units).pairs[0].chosen == [assistant(expected)]
    assert "name the key of its text with --text_key" in bad(
        objects, columns={"responses": "answers", "score_key": "s"}
    )
    assert "field places is [1] (list); must be a list of 2" in bad(
        {**row, "places": [1]}, columns=columns
    )
    assert "score of answers[1] is 'x'" in bad(
        {**row, "places": [1, "x"]}, columns={"responses": "answers", "scores": "places"}
    )
