"""For any input, every row is counted once, and the pairs obey the rules."""

import json

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from oddsmith.errors import UserError
from oddsmith.prepare.curation import REASONS, Rules
from oddsmith.prepare.formats import ReadOptions
from oddsmith.prepare.run import run_prepare
from oddsmith.prepare.scored import Columns

TEXTS = st.sampled_from(
    ["", " ", "a", "A", "b", "What is it?", "what  is it?", "Was ist das?", "é🙂"]
)
SCORES = st.one_of(st.none(), st.integers(0, 5), st.sampled_from(["N/A", "3.5", float("nan")]))
JUNK = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))


def messages(text):
    return st.just([{"role": "user", "content": "q"}, {"role": "assistant", "content": text}])


PAIRS = st.fixed_dictionaries(
    {"chosen": st.one_of(TEXTS, TEXTS.flatmap(messages), JUNK), "rejected": st.one_of(TEXTS, JUNK)},
    optional={
        "prompt": st.one_of(TEXTS, JUNK),
        "score_chosen": st.one_of(SCORES, st.lists(SCORES, max_size=3)),
        "score_rejected": st.one_of(SCORES, st.lists(SCORES, max_size=3)),
        "lang": st.sampled_from(["en", "de", ""]),
    },
)
DIALOGUES = st.fixed_dictionaries(
    {
        side: st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), TEXTS), max_size=4).map(
            lambda turns: "".join(f"\n\n{who}: {text}" for who, text in turns)
        )
        for side in ("chosen", "rejected")
    }
)
RATED = st.fixed_dictionaries(
    {"response": st.one_of(TEXTS, JUNK), "overall_score": SCORES},
    optional={"annotations": st.dictionaries(
        st.sampled_from(["honesty", "truthfulness"]), st.fixed_dictionaries({"Rating": SCORES})
    )},
)  # fmt: skip
ULTRAFEEDBACK = st.fixed_dictionaries(
    {"instruction": TEXTS, "completions": st.one_of(st.lists(RATED, max_size=4), JUNK)}
)
RESPONSES = st.fixed_dictionaries(
    {"prompt": TEXTS, "answer": TEXTS}, optional={"mark": st.one_of(SCORES, st.lists(SCORES))}
)
NAMES = st.sampled_from("uvwxyz")
MESSAGES = st.fixed_dictionaries(
    {
        "message_id": NAMES,
        "parent_id": st.one_of(st.none(), NAMES),
        "text": st.one_of(TEXTS, JUNK),
        "role": st.sampled_from(["prompter", "assistant", "assistant", "robot"]),
        "rank": st.one_of(st.none(), st.integers(0, 3)),
    },
    optional={"deleted": st.booleans(), "review_result": st.booleans()},
)
RULES = st.builds(
    Rules,
    min_score=st.one_of(st.none(), st.floats(0, 5)),
    min_gap=st.floats(0, 3),
    keep_ties=st.booleans(),
    min_agreement=st.floats(0, 1),
    languages=st.sampled_from([frozenset(), frozenset({"en"})]),
    duplicates=st.booleans(),
    near_duplicates=st.one_of(st.none(), st.floats(0.5, 1)),
)
PAIRINGS = st.sampled_from(["best_worst", "best_random", "all"])
FORMATS = {
    "pairs": PAIRS,
    "hh": DIALOGUES,
    "ultrafeedback": ULTRAFEEDBACK,
    "responses": RESPONSES,
    "oasst": MESSAGES,
}
CASES = st.sampled_from(sorted(FORMATS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.lists(
            st.one_of(FORMATS[kind].map(json.dumps), st.sampled_from(["[]", "{", '{"a": 1}'])),
            min_size=1,
            max_size=14,
        ),
    )
)


def content(side):
    return side if isinstance(side, str) else side[-1]["content"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(CASES, RULES, PAIRINGS)
def test_counts_add_up(tmp_path, case, rules, pairing):
    kind, lines = case
    assume(lines != ["[]"])  # one array, without rows
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(line + "\n" for line in lines))
    options = ReadOptions(kind, pairing, False, Columns(response="answer", scores="mark")
                          if kind == "responses" else Columns())  # fmt: skip
    try:
        summary = run_prepare([str(source)], out, options, rules, overwrite=True)
    except UserError as error:
        assert f"none of {len(lines)} rows is kept" in str(error)
        return
    rows = summary["rows"]
    assert rows["read"] == len(lines) == rows["kept"] + sum(rows["dropped"].values())
    assert set(rows["dropped"]) <= set(REASONS) and rows["kept"] > 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(written) == summary["pairs"]["written"] > 0
    assert 1 <= summary["diversity"]["distinct_prompts"] <= len(written)
    forms = set()
    for row in written:
        forms.add(type(row["chosen"]))
        assert content(row["prompt"]).strip()
        answers = [content(row[side]).strip() for side in ("chosen", "rejected")]
        assert all(answers) and answers[0] != answers[1]
        scores = row.get("score_chosen"), row.get("score_rejected")
        if None not in scores and kind in ("pairs", "ultrafeedback") and rules.min_gap > 0:
            assert scores[0] - scores[1] >= rules.min_gap - 1e-9
        if scores[0] is not None and rules.min_score is not None:
            assert scores[0] >= rules.min_score
    assert len(forms) == 1
