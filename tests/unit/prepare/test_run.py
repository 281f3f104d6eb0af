"""`oddsmith prepare`: its output, and that files are complete or not written."""

import gzip
import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from oddsmith import cli
from oddsmith.cli import data_flags
from oddsmith.errors import UserError
from oddsmith.prepare.curation import REASONS, Rules
from oddsmith.prepare.formats import FORMATS, ReadOptions
from oddsmith.prepare.pair import Unit, assistant, user
from oddsmith.prepare.run import Ledger, run_prepare
from oddsmith.prepare.scored import PAIRINGS


def row(prompt, chosen="Yes, with milk.", rejected="No.", **more):
    return {
        "prompt": prompt,
        "chosen": [user(prompt), assistant(chosen)],
        "rejected": [user(prompt), assistant(rejected)],
        **more,
    }


ROWS = [
    row("Is there tea?", score_chosen=8.0, score_rejected=5.0),
    row("Is there coffee?", score_chosen=7.0, score_rejected=7.0),  # too close
    row("is there  TEA?", score_chosen=9.0, score_rejected=2.0),  # duplicate
    row("Wo ist der Tee?", score_chosen=9.0, score_rejected=2.0),  # German
    row("Is there wine?", score_chosen=2.0, score_rejected=1.0),  # both poor
    row("Is there beer?", score_chosen=3.0, score_rejected=6.0),  # disagree
    row("Is there salt?", "Same", "Same "),
    row("Is there bread?", ""),
    row("Is there water?", score_chosen=6.0, score_rejected=2.5),
]
RULES = Rules(min_score=3.0, languages=frozenset({"en"}))


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def load(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", ["out.jsonl", "sub/out.jsonl.gz", "out.parquet"])
def test_every_row_is_kept_or_has_its_reason(name, tmp_path, capsys):
    out = tmp_path / name
    summary = run_prepare([write(tmp_path / "rows.jsonl", ROWS)], out, rules=RULES)
    assert summary["rows"] == {
        "read": 9,
        "kept": 2,
        "dropped": {
            "empty answer": 1,
            "same answers": 1,
            "annotators disagree": 1,
            "both poor": 1,
            "scores too close": 1,
            "other language": 1,
            "duplicate prompt": 1,
        },
    }
    assert load(out) == [
        {
            "prompt": [user(prompt)],
            "chosen": [assistant("Yes, with milk.")],
            "rejected": [assistant("No.")],
            "score_chosen": high,
            "score_rejected": low,
        }
        for prompt, high, low in (("Is there tea?", 8.0, 5.0), ("Is there water?", 6.0, 2.5))
    ]
    written = json.loads((out.parent / "out.summary.json").read_text())
    assert written == summary
    assert summary["diversity"]["distinct_prompts"] == 2
    shown = capsys.readouterr().out
    assert "read              9" in shown and "kept              2  (22.2%)" in shown
    for reason in summary["rows"]["dropped"]:
        assert f"1  {reason}: {REASONS[reason]}" in shown
    # No other files are left.
    assert sorted(p.name for p in out.parent.iterdir() if not p.name.startswith("rows")) in (
        sorted([out.name, "out.summary.json"]),
        sorted([out.name, "out.summary.json", "sub"]),
    )
    assert out.stat().st_mode & 0o044


def test_text_stays_text(tmp_path):
    rows = [{"prompt": "q é ", "chosen": "a\u2028b", "rejected": "c"}]
    for name in ("out.jsonl", "out.parquet"):
        run_prepare([write(tmp_path / "rows.jsonl", rows)], tmp_path / name, overwrite=True)
        (made,) = load(tmp_path / name)
        assert {key: made[key] for key in rows[0]} == rows[0]


def test_the_same_input_makes_the_same_bytes(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    made = []
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        run_prepare([source], tmp_path / name)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_several_files_are_one_dataset(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", ROWS[i::2]) for i in range(2)]
    summary = run_prepare(files, tmp_path / "out.jsonl")
    assert summary["rows"]["read"] == 9
    assert summary["rows"]["dropped"]["duplicate prompt"] == 1
    assert summary["datasets"] == files


def test_a_file_that_is_there_is_kept(tmp_path):
    source, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match="out.jsonl exists; --overwrite replaces it"):
        run_prepare([source], out)
    assert out.read_text() == "mine"
    run_prepare([source], out, overwrite=True)
    assert len(load(out)) == 4
    (tmp_path / "new.summary.json").write_text("mine")
    with pytest.raises(UserError, match="new.summary.json exists"):
        run_prepare([source], tmp_path / "new.jsonl")


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.jsonl.gz"])
def test_a_failed_run_leaves_nothing(name, tmp_path):
    source = write(tmp_path / "rows.jsonl", [*ROWS * 60, {"prompt": "q", "chosen": 5}])
    with pytest.raises(UserError, match=r"rows.jsonl line 541: field chosen is 5 \(int\)"):
        run_prepare([source], tmp_path / name, rules=Rules(duplicates=True))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    summary = run_prepare([source], tmp_path / name, ReadOptions(stop_at_bad_rows=False))
    assert summary["rows"]["read"] == 541
    assert summary["rows"]["dropped"]["bad row"] == 1


def test_a_failed_run_leaves_the_old_file(tmp_path):
    out = tmp_path / "out.jsonl"
    run_prepare([write(tmp_path / "rows.jsonl", ROWS)], out)
    before = out.read_bytes()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "chosen": "a", "rej')
    with pytest.raises(UserError, match=r"rows.jsonl line 1: not JSON: .*ends in the middle"):
        run_prepare([str(tmp_path / "rows.jsonl")], out, overwrite=True)
    assert out.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS[6:8])
    with pytest.raises(UserError, match="none of 2 rows is kept") as error:
        run_prepare([source], tmp_path / "out.jsonl")
    assert "1  empty answer" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_unit_that_does_not_add_up_is_a_bug():
    class Wrong(Unit):
        def fates(self, outcomes):
            yield "no prompt", 1

    ledger = Ledger(0, Counter(), 0, Counter())
    with pytest.raises(RuntimeError, match="x: 1 of 2 rows are accounted for"):
        ledger.enter(Wrong("x", rows=2), [])
    with pytest.raises(RuntimeError, match="unheard of"):
        ledger.enter(Unit("x", reason="unheard of"), [])


# ---- The command ----


def test_the_command(tmp_path, capsys):
    source, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    argv = ["prepare", source, "--output", str(out), "--min-score", "3", "--languages", "EN"]
    assert cli.main(argv) == 0
    assert len(load(out)) == 2
    assert cli.main(argv) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite", "--min_agreement", "0", "--keep_ties"]) == 0
    assert len(load(out)) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "x.csv"], "--output x.csv: must end in .jsonl, .jsonl.gz, .parquet"),
        (["--output", "x.jsonl", "--min_gap", "-1"], "min_gap is -1.0; must be at least 0"),
        (["--output", "x.jsonl", "--format", "scored"], "needs responses_column"),
        (["--output", "x.jsonl", "--temp_dir", "/no/such"], "--temp_dir /no/such: no such folder"),
    ],
)
def test_wrong_flags(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "rows.jsonl", ROWS)
    assert cli.main(["prepare", source, *flags]) == 1
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_flags_offer_what_there_is():
    # data_flags repeats the names, so that help does not import the parsers.
    parser = data_flags.prepare_parser()
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["format"] == ("auto", *FORMATS)
    assert choices["pairing"] == PAIRINGS


def test_argparse_errors(capsys):
    assert cli.main(["prepare", "x.jsonl"]) == 2
    assert "--output" in capsys.readouterr().err
    assert cli.main(["prepare", "--help"]) == 0
    assert "--near_duplicates" in capsys.readouterr().out


def test_the_summary_says_what_was_taken_for_what_and_what_has_no_scores(tmp_path, capsys):
    rows = [
        {"question": f"Is there tea no {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(3)
    ]
    rows[0].update({"chosen-rating": 4.0, "rejected-rating": 1.0})
    source, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    summary = run_prepare([source], out, rules=Rules(min_gap=1.0))
    assert summary["columns"] == "question is the prompt"
    assert summary["without_scores"] == {"pairs": 2, "of": 3}
    assert [each["prompt"] for each in load(out)] == [each["question"] for each in rows]
    shown = capsys.readouterr().out
    assert "question is the prompt" in shown
    assert "2 of 3 pairs have no score: --min_score and --min_gap cannot drop them" in shown
    summary = run_prepare([source], out, overwrite=True)
    assert summary["without_scores"]["pairs"] == 0  # no rule asks for them
