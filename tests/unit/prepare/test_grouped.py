"""One answer per row: rows grouped by prompt, and the result of each."""

from oddsmith.prepare.pair import assistant
from support.prepared_units import TALK, bad, read


def test_one_answer_per_row(tmp_path):
    columns = {"response": "answer", "scores": "score"}
    rows = [
        {"prompt": "Tea?", "answer": "fair", "score": 2},
        {"prompt": "Milk?", "answer": "alone", "score": 2},
        {"prompt": "Tea?", "answer": "best", "score": 3},
        {"prompt": "Tea?", "answer": "unscored"},
        {"prompt": "Tea?", "answer": "worst", "score": 1},
    ]
    kind, units = read(rows, columns=columns, folder=tmp_path)
    assert kind == "responses"
    tea, milk = units
    (pair,) = tea.pairs
    assert (pair.chosen, pair.rejected) == ([assistant("best")], [assistant("worst")])
    assert list(tea.fates([None])) == [
        ("neither best nor worst", 1), (None, 1), ("no score or rank", 1), (None, 1),
    ]  # fmt: skip
    assert list(tea.fates(["both poor"])) == [
        ("neither best nor worst", 1), ("both poor", 1), ("no score or rank", 1), ("both poor", 1),
    ]  # fmt: skip
    assert (milk.reason, milk.rows) == ("fewer than two answers", 1)
    assert list(tmp_path.iterdir()) == []  # the temporary file is removed
    assert "field answer is missing" in bad({"prompt": "q"}, columns=columns)
    differ = [{**rows[0], "score": [1, 2]}, {**rows[2], "score": [3]}]
    _, units = read(differ, columns=columns, stop_at_bad_rows=False)
    assert [(unit.reason, unit.rows) for unit in units] == [("bad row", 2)]


def test_rows_are_grouped_by_the_whole_prompt(tmp_path):
    columns = {"response": "answer", "ranks": "place", "lang": "code"}
    talk = [{"prompt": TALK, "answer": text, "place": place, "code": "pt-BR"} for text, place in
            (("second", 2), ("first", 1))]  # fmt: skip
    alone = {"prompt": TALK[-1:], "answer": "other", "place": 1}
    _, units = read([talk[0], alone, talk[1]], columns=columns, folder=tmp_path)
    conversation, question = units
    (pair,) = conversation.pairs
    assert (pair.prompt, pair.chosen) == (TALK, [assistant("first")])
    assert (pair.ranked, pair.lang, pair.score_chosen) == (True, "pt", None)
    assert (conversation.where, conversation.rows) == ("rows.jsonl line 1", 2)
    assert (question.reason, question.where) == ("fewer than two answers", "rows.jsonl line 2")


def test_an_answer_in_a_kept_pair_is_kept(tmp_path):
    columns = {"response": "answer", "scores": "score"}
    rows = [{"prompt": "q", "answer": text, "score": score} for text, score in
            (("a", 3), ("b", 2), ("c", 1))]  # fmt: skip
    _, units = read(rows, columns=columns, folder=tmp_path, pairing="all")
    (unit,) = units
    sides = [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in unit.pairs]
    assert sides == [("a", "b"), ("a", "c"), ("b", "c")]
    fates = list(unit.fates(["both poor", None, "scores too close"]))
    assert fates == [(None, 1), ("both poor", 1), (None, 1)]
