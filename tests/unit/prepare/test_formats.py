"""Each format of preference data: hand-made rows, with the pairs that they must make."""

import pytest

from oddsmith.errors import UserError
from oddsmith.prepare.formats import FORMATS, ReadOptions, detect_format, read_units
from oddsmith.prepare.pair import assistant, user
from oddsmith.prepare.scored import Columns, draw_pairs
from oddsmith.sources.records import Record


def read(rows, **options):
    columns = Columns(**options.pop("columns", {}))
    records = [Record(row, "rows.jsonl", "line", index + 1) for index, row in enumerate(rows)]
    return read_units(records, ReadOptions(columns=columns, **options))


def pairs_of(rows, **options):
    """Format, and for each unit its pairs as (prompt, chosen, rejected), or its reason."""
    kind, units = read(rows, **options)
    return kind, [
        [(pair.prompt, pair.chosen, pair.rejected) for pair in unit.pairs] or unit.reason
        for unit in units
    ]


def bad(row, **options):
    with pytest.raises(UserError) as error:
        list(read([row], **options)[1])
    # The same row, dropped instead: counted, with its reason.
    _, units = read([row], **{**options, "stop_at_bad_rows": False})
    assert [(unit.reason, unit.rows) for unit in units] == [("bad row", 1)]
    assert str(error.value).startswith("rows.jsonl line 1: ")
    return str(error.value)


# ---- Pairs ----

TALK = [user("Hi"), assistant("Hello"), user("Tea?")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (  # UltraFeedback-binarized: a bare prompt beside whole conversations
            {
                "prompt": "Tea?",
                "chosen": [user("Tea?"), assistant("Yes")],
                "rejected": [user("Tea?"), assistant("No")],
                "messages": [user("Tea?"), assistant("Yes")],
            },
            ([user("Tea?")], [assistant("Yes")], [assistant("No")]),
        ),
        (  # a prompt of messages, answers alone
            {"prompt": TALK, "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
            (TALK, [assistant("Yes")], [assistant("No")]),
        ),
        (  # a prompt of messages, and once more in both
            {
                "prompt": TALK,
                "chosen": [*TALK, assistant("Yes")],
                "rejected": [*TALK, assistant("No")],
            },
            (TALK, [assistant("Yes")], [assistant("No")]),
        ),
        (  # no prompt column
            {"chosen": [*TALK, assistant("Yes")], "rejected": [*TALK, assistant("No")]},
            (TALK, [assistant("Yes")], [assistant("No")]),
        ),
        (  # a system message, and names of other collections
            {
                "chosen": [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"},
                           {"from": "gpt", "value": "A"}],
                "rejected": [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"},
                             {"from": "gpt", "value": "B"}],
            },
            ([{"role": "system", "content": "Be"}, user("Hi")], [assistant("A")], [assistant("B")]),
        ),
        (  # a bare prompt, answers without it
            {"prompt": "Tea?", "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
            ([user("Tea?")], [assistant("Yes")], [assistant("No")]),
        ),
        (  # text stays text
            {"prompt": "Tea? ", "chosen": "Yes", "rejected": "No"},
            ("Tea? ", "Yes", "No"),
        ),
        ({"chosen": "Tea? Yes", "rejected": "Tea? No"}, ("Tea?", " Yes", " No")),
        (
            {"prompt": TALK, "chosen": "Yes", "rejected": "No"},
            (TALK, [assistant("Yes")], [assistant("No")]),
        ),
        ({"prompt": " ", "chosen": "Yes", "rejected": "No"}, "no prompt"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no prompt"),
        # The same in both: the last message is the answer, and curation drops the pair.
        (
            {"chosen": [*TALK, assistant("Yes")], "rejected": [*TALK, assistant("Yes")]},
            (TALK, [assistant("Yes")], [assistant("Yes")]),
        ),
    ],
)  # fmt: skip
def test_pairs(row, expected):
    kind, (unit,) = pairs_of([row])
    assert kind == "pairs"
    assert unit == (expected if isinstance(expected, str) else [expected])


def test_scores_and_votes_of_pairs():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [
        {**row, "score_chosen": 8, "score_rejected": "6.5", "lang": "pt-BR"},
        {**row, "score_chosen": [5, 2, None, 3], "score_rejected": [1, 4, 2, 3]},
        {**row, "score_chosen": float("nan"), "score_rejected": "N/A", "idioma": "es"},
    ]
    _, units = read(rows)
    pairs = [unit.pairs[0] for unit in units]
    assert [(p.score_chosen, p.score_rejected, p.votes, p.lang) for p in pairs] == [
        (8.0, 6.5, None, "pt"),
        (10 / 3, 2.5, (1, 1), None),
        (None, None, None, None),
    ]
    _, units = read(rows[2:], columns={"lang": "idioma"})
    assert next(units).pairs[0].lang == "es"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "field chosen is null"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "field prompt is 3 (int); must be a string"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "field chosen is [] (list)"),
        ({"prompt": "q", "chosen": [user("a")], "rejected": "b"}, "must both be strings or both"),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, "field chosen[0] is 'a' (str)"),
        (
            {"prompt": "q", "chosen": [{"content": "a"}], "rejected": "b"},
            "field chosen[0].role is None",
        ),
        (
            {"prompt": "q", "chosen": [{"role": "user", "content": 5}], "rejected": "b"},
            "field chosen[0].content is 5",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "high"},
            "field score_chosen is 'high' (str); must be a number",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": [1, 2],
             "score_rejected": [1]},
            "score_chosen has 2 annotators and score_rejected 1",
        ),
        ({"prompt": "q", "chosen": "a\ud800", "rejected": "b"}, "half a surrogate pair"),
    ],
)  # fmt: skip
def test_bad_pairs(row, words):
    assert words in bad(row)


# ---- HH-RLHF ----


def test_dialogues():
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:"
    rows = [
        {"chosen": f"{shared} Yes: \n\nnow", "rejected": f"{shared} No"},
        {"chosen": f"{shared} Yes", "rejected": f"{shared} No\n\nHuman: Why?"},
        {"chosen": f"{shared} Yes", "rejected": shared.replace("Hello", "Hey") + " No"},
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        # Two turns of one side are one message.
        {
            "chosen": "\n\nHuman: Hi\n\nHuman: Tea?\n\nAssistant: a",
            "rejected": "\n\nHuman: Hi\n\nHuman: Tea?\n\nAssistant:",
        },
    ]
    kind, units = pairs_of(rows)
    assert kind == "hh"
    assert units == [
        [(TALK, [assistant("Yes: \n\nnow")], [assistant("No")])],
        "no answer at the end",
        "dialogues part earlier",
        "no prompt",
        [([user("Hi\n\nTea?")], [assistant("a")], [assistant("")])],
    ]
    assert "must begin with '\\n\\nHuman:'" in bad(
        {"chosen": "Assistant: x", "rejected": rows[0]["rejected"]}, format="hh"
    )


# ---- Several answers ----


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


def test_one_answer_a_row(tmp_path):
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
    assert list(tmp_path.iterdir()) == []  # the file on the way is gone
    assert "field answer is missing" in bad({"prompt": "q"}, columns=columns)
    differ = [{**rows[0], "score": [1, 2]}, {**rows[2], "score": [3]}]
    _, units = read(differ, columns=columns, stop_at_bad_rows=False)
    assert [(unit.reason, unit.rows) for unit in units] == [("bad row", 2)]


# ---- Detection ----


def test_formats_are_told_apart():
    assert set(FORMATS) == {"pairs", "hh", "ultrafeedback", "oasst", "oasst_trees", "scored",
                            "responses"}  # fmt: skip
    with pytest.raises(
        UserError, match="x line 3: the format cannot be told from the columns a, b"
    ):
        detect_format({"a": 1, "b": 2}, Columns(), "x line 3")
    dialogue = "\n\nHuman: a\n\nAssistant: b"
    row = {"chosen": dialogue, "rejected": dialogue}
    assert detect_format(row, Columns(), "x") == "hh"
    assert detect_format({**row, "prompt": "a"}, Columns(), "x") == "pairs"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "csv"}, "format is 'csv'; must be auto, pairs"),
        ({"pairing": "worst_best"}, "pairing is 'worst_best'; must be best_worst"),
        ({"format": "scored"}, "needs responses_column, and scores_column"),
        ({"columns": Columns(responses="a")}, "format 'scored' needs"),
        ({"columns": Columns(response="a")}, "format 'responses' needs"),
        ({"columns": Columns(response="a", responses="b")}, "name one"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        ReadOptions(**options)
