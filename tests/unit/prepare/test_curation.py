"""The rules, one by one, and duplicates."""

import pytest

from oddsmith.prepare.curation import Curator, Rules, content_of
from oddsmith.prepare.pair import Pair, Unit, assistant, user


def pair(prompt="Where is it?", chosen="Here.", rejected="There.", *scores, **more):
    return Pair([user(prompt)], [assistant(chosen)], [assistant(rejected)], *scores, **more)


@pytest.mark.parametrize(
    ("given", "rules", "reason"),
    [
        (pair(), {}, None),
        (pair(chosen="  "), {}, "empty answer"),
        (pair(rejected=""), {}, "empty answer"),
        (pair(rejected=" Here.\n"), {}, "same answers"),
        # Scores: 4 for, 3 against is 0.57 of the votes.
        (pair(votes=(4, 3)), {}, "annotators disagree"),
        (pair(votes=(3, 2)), {}, None),
        (pair(votes=(3, 2)), {"min_agreement": 0.7}, "annotators disagree"),
        (pair(votes=(7, 3)), {"min_agreement": 0.7}, None),  # 0.7 of them exactly
        (pair(votes=(0, 0)), {}, None),
        (pair(votes=(1, 3)), {"min_agreement": 0.0}, None),
        (pair("q", "a", "b", 3.0, 4.0), {}, "annotators disagree"),
        (pair("q", "a", "b", 3.0, 4.0), {"min_agreement": 0.0}, None),
        (pair("q", "a", "b", 3.0, 4.0, ranked=True), {}, None),
        (pair("q", "a", "b", 3.0, 2.0), {"min_score": 3.5}, "both poor"),
        (pair("q", "a", "b", 3.5, 2.0), {"min_score": 3.5}, None),
        (pair("q", "a", "b", None, None), {"min_score": 3.5, "min_gap": 1.0}, None),
        (pair("q", "a", "b", 3.0, 3.0), {}, "scores too close"),
        (pair("q", "a", "b", 3.0, 3.0), {"keep_ties": True}, None),
        (pair("q", "a", "b", 3.0, 3.0, ranked=True), {}, None),
        (pair("q", "a", "b", 3.0, 2.5), {"min_gap": 0.75}, "scores too close"),
        (pair("q", "a", "b", 0.9, 0.6), {"min_gap": 0.3}, None),  # 0.30000000000000004 - or less
        (pair(lang="de"), {"languages": frozenset({"en"})}, "other language"),
        (pair(lang="en"), {"languages": frozenset({"en"})}, None),
        (pair("Wo ist das Buch?"), {"languages": frozenset({"en"})}, "other language"),
        (pair("Wo ist das Buch?"), {"languages": frozenset({"en", "de"})}, None),
        (pair("2+2=?"), {"languages": frozenset({"en"})}, None),
    ],
)
def test_rules(given, rules, reason):
    assert Rules(**rules).reject(given) == reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_gap", -0.1),
        ("min_gap", float("nan")),
        ("min_agreement", 1.1),
        ("min_score", float("inf")),
        ("near_duplicates", 0.0),
        ("near_duplicates", 1.1),
    ],
)
def test_rules_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Rules(**{name: value})


def judge(pairs, batches=1, **rules):
    """One unit per pair, in several batches."""
    curator = Curator(Rules(**rules))
    units = [Unit(str(index), [each]) for index, each in enumerate(pairs)]
    size = -(-len(units) // batches)
    outcomes = []
    for start in range(0, len(units), size):
        outcomes += [reason for (reason,) in curator.judge(units[start : start + size])]
    curator.close()
    return outcomes, curator


LONG = "Tell me in one paragraph how the water wheel of an old mill drives its stones, please."


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_duplicate_prompts(batches):
    pairs = [
        pair("What is it?", rejected="Here."),  # dropped for its answers: does not count as seen
        pair("What is it?"),
        pair("  what  IS it? "),
        pair(LONG),
        pair(LONG.replace("old", "odd")),
    ]
    outcomes, curator = judge(pairs, batches)
    assert outcomes == ["same answers", None, "duplicate prompt", None, None]
    assert (curator.distinct, curator.near) == (3, 1)
    outcomes, curator = judge(pairs, batches, duplicates=True, near_duplicates=0.8)
    assert outcomes == ["same answers", None, None, None, "near-duplicate prompt"]
    assert (curator.distinct, curator.near) == (2, 0)


def test_pairs_of_one_unit_are_no_duplicates_of_each_other():
    unit = Unit("a", [pair(LONG), pair(LONG, "Other."), pair(LONG.replace("old", "odd"))])
    again = Unit("b", [pair(LONG), pair("Else?")])
    curator = Curator(Rules(near_duplicates=0.8))
    assert curator.judge([unit, again]) == [[None] * 3, ["duplicate prompt", None]]
    assert curator.distinct == 3
    assert curator.judge([unit]) == [["duplicate prompt"] * 3]
    curator.close()


def test_the_whole_conversation_is_the_prompt():
    first = Pair([user("Hi"), assistant("Hello"), user("More")], *([assistant(t)] for t in "ab"))
    other = Pair([user("Hi"), assistant("Hey"), user("More")], *([assistant(t)] for t in "ab"))
    assert judge([first, other, first])[0] == [None, None, "duplicate prompt"]
    assert content_of(first.prompt) == "user: Hi\nassistant: Hello\nuser: More"


def test_text_and_messages_do_not_go_into_one_file():
    text = Pair("q", "a", "b")
    assert judge([pair("w"), text])[0] == [None, "text among messages"]
    assert judge([text, pair("w")])[0] == [None, "text among messages"]
