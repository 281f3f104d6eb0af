"""Flags of `oddsmith prepare` and `oddsmith inspect`, and their values."""

import re

import pytest

from oddsmith.cli.data_flags import inspect_parser, prepare_parser, run_inspect, run_prepare
from oddsmith.errors import UserError
from oddsmith.prepare.curation import Rules
from oddsmith.prepare.formats import ReadOptions
from oddsmith.prepare.scored import Columns
from oddsmith.sources.json_records import LONGEST


@pytest.fixture
def prepared(monkeypatch):
    """Records the arguments of the run."""
    calls = []

    def record(datasets, output, options, rules, **others):
        calls.append((datasets, output, options, rules, others))

    monkeypatch.setattr("oddsmith.prepare.run.run_prepare", record)
    return calls


def test_prepare_flags_reach_their_options(prepared, tmp_path):
    argv = (
        f"a.jsonl b/c --output out.parquet --overwrite --dataset_config en --split test "
        f"--temp-dir {tmp_path} --format scored --pairing all --prompt_column q "
        "--responses-column answers --scores_column s --ranks-column r "
        "--text_key t --score_key k --rank_key p --lang_column l --bad_rows drop --min_score 2.5 "
        "--min-gap 0.5 --keep_ties --min_agreement 0.75 --languages EN de --keep_duplicates "
        "--near_duplicates 0.9 --max_line_mb 3"
    )
    assert run_prepare(argv.split()) == 0
    ((datasets, output, options, rules, others),) = prepared
    assert (datasets, output) == (["a.jsonl", "b/c"], "out.parquet")
    columns = Columns(
        prompt="q", responses="answers", scores="s", ranks="r",
        text_key="t", score_key="k", rank_key="p", lang="l",
    )  # fmt: skip
    assert options == ReadOptions("scored", "all", False, columns, str(tmp_path))
    assert rules == Rules(2.5, 0.5, True, 0.75, frozenset({"en", "de"}), True, 0.9)
    assert others == {
        "config": "en", "split": "test", "overwrite": True, "temp_dir": str(tmp_path),
        "longest": 3 << 20,
    }  # fmt: skip


def test_prepare_defaults_are_those_of_the_options(prepared):
    run_prepare(["x", "--output", "y.jsonl"])
    ((_, _, options, rules, others),) = prepared
    assert rules == Rules()
    assert options == ReadOptions("auto", "best_worst", True, Columns(), None)
    assert others == {
        "config": None, "split": None, "overwrite": False, "temp_dir": None, "longest": LONGEST
    }  # fmt: skip


def test_one_answer_per_row_is_another_column(prepared):
    argv = "x --output y.jsonl --response-column answer --scores_column s"
    run_prepare(argv.split())
    assert prepared[0][2].columns == Columns(response="answer", scores="s")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--min_agreement 3", "agreement"),
        ("--near_duplicates 1.5", "near_duplicates"),
    ],
)
def test_values_that_rules_refuse_are_user_errors(prepared, flags, words):
    with pytest.raises(UserError, match=words):
        run_prepare(["x", "--output", "y.jsonl", *flags.split()])
    assert not prepared


def test_inspect_flags_reach_the_run(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "oddsmith.inspection.run.run_inspect", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    argv = (
        "d --model m --model-revision v --dataset_config c --split s --rows 9 --max_length 77 "
        "--max-prompt-length 33 --overlength drop --batch_size 5 --chat_template t.jinja "
        "--trust_remote_code --json --histogram h.png --prompt_column q "
        '--column_mapping {"s":"system"} --max_line_mb 5'
    )
    assert run_inspect(argv.split()) == 0
    assert run_inspect(["d", "--model", "m"]) == 0
    expected = {
        "config": "c", "split": "s", "rows": 9, "max_length": 77, "max_prompt_length": 33,
        "overlength": "drop", "batch_size": 5, "chat_template": "t.jinja", "revision": "v",
        "trust_remote_code": True, "as_json": True, "histogram": "h.png",
        "column_mapping": {"s": "system", "q": "prompt"}, "args": None, "peft_config": None,
        "longest": 5 << 20,
    }  # fmt: skip
    plain = {
        "config": None, "split": None, "rows": None, "max_length": 1024,
        "max_prompt_length": None, "overlength": "truncate", "batch_size": 2,
        "chat_template": None, "revision": None, "trust_remote_code": False, "as_json": False,
        "histogram": None, "column_mapping": {}, "args": None, "peft_config": None,
        "longest": LONGEST,
    }  # fmt: skip
    assert calls == [(("d", "m"), expected), (("d", "m"), plain)]


@pytest.mark.parametrize(
    ("parser", "argv", "reason"),
    [
        (prepare_parser, ["x"], "arguments are required: --output"),
        (prepare_parser, ["--output", "y"], "arguments are required: DATASET"),
        (prepare_parser, ["x", "--output", "y", "--format", "csv"], "invalid choice: 'csv'"),
        (inspect_parser, ["x"], "arguments are required: --model"),
        (inspect_parser, ["x", "--model", "m", "--rows", "0"], "'0' is not a whole number above 0"),
        (inspect_parser, ["x", "--model", "m", "--overlength", "keep"], "invalid choice: 'keep'"),
    ],
)
def test_wrong_flags(parser, argv, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser().parse_args(argv)
    assert exit_.value.code == 2
    assert re.search(re.escape(reason), capsys.readouterr().err)
