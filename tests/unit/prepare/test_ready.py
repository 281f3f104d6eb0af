"""Rows that are already pairs, and dialogues, with the expected pairs."""

import pytest

from oddsmith.prepare.pair import assistant, user
from oddsmith.prepare.ready import SCORES
from support.prepared_units import TALK, bad, pairs_of, read


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (  # UltraFeedback-binarized: a prompt string and complete conversations
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
        (  # a prompt of messages, repeated in both
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
        (  # a prompt string, answers without it
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


# Columns of other names


def test_the_prompt_of_another_column():
    rows = [
        {"instruction": f"Say {i}", "chosen": "b", "rejected": "c", "source": "x"} for i in range(2)
    ]
    expected = [[(f"Say {i}", "b", "c")] for i in range(2)]
    assert pairs_of(rows)[1] == expected
    # A name that nobody knows, given by the user.
    rows = [{"frage" if key == "instruction" else key: row[key] for key in row} for row in rows]
    assert pairs_of(rows, columns={"prompt": "frage"})[1] == expected
    assert "the row has no column other" in bad(rows[0], columns={"prompt": "other"})


def test_a_system_message_belongs_to_the_prompt():
    row = {"system": "Be brief.", "prompt": "Hi", "chosen": "b", "rejected": "c"}
    system = {"role": "system", "content": "Be brief."}
    pair = ([system, user("Hi")], [assistant("b")], [assistant("c")])
    assert pairs_of([row])[1] == [[pair]]
    (alone,) = pairs_of([{**row, "system": ""}])[1][0]
    assert alone == ([user("Hi")], *pair[1:])  # of the same kind as the others
    row = {"question" if key == "prompt" else key: row[key] for key in row}
    assert pairs_of([row])[1] == pairs_of([row], columns={"prompt": "question"})[1] == [[pair]]


@pytest.mark.parametrize("names", SCORES)
def test_scores_under_their_usual_names(names):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", names[0]: "4.5", names[1]: 2}
    _, units = read([row])
    (pair,) = next(iter(units)).pairs
    assert (pair.score_chosen, pair.score_rejected) == (4.5, 2.0)
