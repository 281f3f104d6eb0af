"""OpenAssistant's trees: pairs by rank, and the result of every message."""

import random
from collections import Counter

import pytest

from oddsmith.errors import UserError
from oddsmith.prepare.curation import Rules
from oddsmith.prepare.formats import ReadOptions, read_units
from oddsmith.prepare.pair import assistant, user
from oddsmith.sources.records import Record


def message(name, parent, text, role="assistant", **more):
    return {
        "message_id": name, "parent_id": parent, "text": text, "role": role, "lang": "en",
        "deleted": False, "review_result": True, "message_tree_id": "not looked at",
        "tree_state": "ready_for_export", **more,
    }  # fmt: skip


def quality(value):
    return {"labels": {"name": ["spam", "quality"], "value": [0.0, value], "count": [3, 3]}}


# q has three ranked answers and one without a rank; under the best of them p asks again, with two
# answers; under the worst r asks again, with one.
TREE = [
    message("q", None, "Tea?", "prompter"),
    message("a", "q", "Best", rank=0, **quality(0.9)),
    message("b", "q", "Fair", rank=1, **quality(0.7)),
    message("c", "q", "Worst", rank=2, **quality(0.3)),
    message("d", "q", "Unranked", rank=None),
    message("p", "a", "Why?", "prompter"),
    message("e", "p", "So", rank=1),
    message("f", "p", "Because", rank=0),
    message("r", "c", "What?", "prompter"),
    message("g", "r", "Alone", rank=0),
]


def read(rows, tmp_path=None, **options):
    records = [Record(row, "m.jsonl", "line", index + 1) for index, row in enumerate(rows)]
    kind, units = read_units(records, ReadOptions(folder=tmp_path, **options))
    return kind, list(units)


def nested(rows):
    """The same messages as ready trees, one tree per row."""
    nodes = {row["message_id"]: {**row, "replies": []} for row in rows}
    roots = []
    for row in rows:
        if row["parent_id"] is None:
            roots.append(nodes[row["message_id"]])
        else:
            nodes[row["parent_id"]]["replies"].append(nodes[row["message_id"]])
    return [
        {"message_tree_id": root["message_id"], "tree_state": root["tree_state"], "prompt": root}
        for root in roots
    ]


def fates(units, outcome=lambda pair: None):
    """Reasons of all rows; `outcome` says what curation does with a pair."""
    counts = Counter()
    for unit in units:
        total = 0
        for reason, count in unit.fates([outcome(pair) for pair in unit.pairs]):
            counts[reason] += count
            total += count
        assert total == unit.rows
    return counts


@pytest.mark.parametrize("ready", [False, True])
def test_pairs_by_rank(ready, tmp_path):
    kind, (unit,) = read(nested(TREE) if ready else TREE, tmp_path)
    assert kind == ("oasst_trees" if ready else "oasst")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in unit.pairs] == [
        ([user("Tea?")], [assistant("Best")], [assistant("Worst")]),
        (
            [user("Tea?"), assistant("Best"), user("Why?")],
            [assistant("Because")],
            [assistant("So")],
        ),
    ]
    first = unit.pairs[0]
    assert (first.score_chosen, first.score_rejected, first.lang) == (0.9, 0.3, "en")
    assert (first.votes, first.ranked) == ((2, 0), True)
    # q a c p e f are in a pair; b and d are not; r and g lead nowhere.
    assert fates([unit]) == {
        None: 6,
        "neither best nor worst": 1,
        "no rank": 1,
        "no two answers to pair": 1,
        "no other ranked answer": 1,
    }
    assert list(tmp_path.iterdir()) == []


def test_the_result_of_a_pair_is_that_of_its_messages():
    (unit,) = read(TREE)[1]
    dropped = fates([unit], lambda pair: "both poor" if len(pair.prompt) > 1 else None)
    # e f p were only in the pair that was dropped; q and a are in the other too.
    assert dropped[None] == 3 and dropped["both poor"] == 3
    # Messages keep their results, so read them again.
    assert fates(read(TREE)[1], lambda pair: "both poor")["both poor"] == 6


def test_all_pairs_and_quality_against_rank():
    rows = [dict(row) for row in TREE[:4]]
    rows[1].update(quality(0.2))  # the best by rank, the worst by quality
    (unit,) = read(rows, pairing="all")[1]
    sides = {(p.chosen[0]["content"], p.rejected[0]["content"]): p.votes for p in unit.pairs}
    assert sides == {("Best", "Fair"): (1, 1), ("Best", "Worst"): (1, 1), ("Fair", "Worst"): (2, 0)}
    reasons = [Rules().reject(pair) for pair in unit.pairs]
    assert reasons == ["annotators disagree", "annotators disagree", None]


@pytest.mark.parametrize("ready", [False, True])
def test_messages_that_are_left_out(ready):
    rows = [dict(row) for row in TREE]
    rows[1]["deleted"] = True  # without a, p e f lose their conversation, and b replaces a
    rows[9]["review_result"] = False
    rows[2]["text"] = " "
    units = read(nested(rows) if ready else rows)[1]
    (unit,) = units
    assert unit.pairs == []
    assert fates(units) == {
        "message deleted": 1,
        "failed review": 1,
        "empty message": 1,
        "below a dropped message": 3,
        "no other ranked answer": 1,
        "no rank": 1,
        "no two answers to pair": 2,
    }


@pytest.mark.parametrize("ready", [False, True])
def test_trees_that_are_not_ready(ready):
    rows = [{**row, "tree_state": "growing"} for row in TREE]
    units = read(nested(rows) if ready else rows)[1]
    assert fates(units) == {"tree not ready": 1, "below a dropped message": 9}


def test_flat_messages_come_in_any_order():
    second = [
        {**row, "message_id": f"2{row['message_id']}",
         "parent_id": row["parent_id"] and f"2{row['parent_id']}"} for row in TREE
    ]  # fmt: skip
    rows = TREE + second
    expected = fates(read(rows)[1])
    assert expected[None] == 12
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        units = read(shuffled)[1]
        assert fates(units) == expected
        assert len(units) == 2
        assert sorted(len(unit.pairs) for unit in units) == [2, 2]


def test_orphans_circles_and_repeats():
    rows = [
        *TREE,
        message("x", "gone", "Orphan", rank=0),
        message("y", "x", "Below", "prompter"),
        message("u", "v", "Circle", "prompter"),
        message("v", "u", "Circle", rank=0),
        message("w", "w", "Itself", rank=0),
        dict(TREE[3]),
    ]
    counted = fates(read(rows)[1])
    assert counted["parent missing"] == 5
    assert counted["message repeated"] == 1
    assert sum(counted.values()) == len(rows)
    assert counted[None] == 6


def test_equal_ranks_make_no_pair():
    rows = [TREE[0], TREE[1], {**TREE[2], "rank": 0}]
    assert fates(read(rows)[1]) == {"no two answers to pair": 1, "no other ranked answer": 2}


def test_bad_messages():
    for row, words in (
        (message("z", None, None, "prompter"), "field text is null"),
        (message("z", None, "a", "robot"), "field role is 'robot'"),
        (message("z", "q", "a", rank="first"), "field rank is 'first'"),
        (message(7, None, "a"), "field message_id is 7"),
    ):
        with pytest.raises(UserError, match="m.jsonl line 11: ") as error:
            read([*TREE, row])
        assert words in str(error.value)
        counted = fates(read([*TREE, row], stop_at_bad_rows=False)[1])
        assert counted["bad row"] == 1 and sum(counted.values()) == 11
    tree = nested(TREE)[0]
    tree["prompt"]["replies"] = "none"
    with pytest.raises(UserError, match="field replies is 'none'"):
        read([tree])


def test_a_tree_of_any_depth():
    rows = [message("0", None, "start", "prompter")]
    for level in range(1, 3000):
        role = "prompter" if level % 2 == 0 else "assistant"
        rows.append(message(str(level), str(level - 1), f"t{level}", role, rank=0))
    flat = fates(read(rows)[1])
    assert sum(flat.values()) == 3000 and flat[None] == 0
    tree = nested(rows)
    assert fates(read(tree)[1]) == flat
