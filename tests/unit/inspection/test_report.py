"""The report on a dataset: figures compared with their definitions, findings one by one."""

import logging

import numpy as np
import pytest
from datasets import Dataset

from oddsmith.data.dataset import prepare_dataset
from oddsmith.data.notes import RowNotes
from oddsmith.data.rows import RowBuilder
from oddsmith.inspection.report import FIGURES, DataReport, log_report, report_rows
from oddsmith.inspection.token_stats import TokenRows, TokenStats
from support.word_tokenizer import WORDS

CLEAN = {"prompt": "a b c d e ", "chosen": "f g", "rejected": "h i"}


def prepare(rows, tokenizer, max_length=20, **kwargs):
    builder = RowBuilder(tokenizer, max_length)
    return prepare_dataset(Dataset.from_list(rows), tokenizer, builder.tokenize_row, **kwargs)


def findings(row, tokenizer, max_length=20, report=False):
    prepared = prepare([CLEAN, CLEAN, row, row], tokenizer, max_length)
    made = report_rows(prepared, tokenizer, max_length=max_length, name="mine")
    return made if report else made.findings


# ---- Findings ----


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {
                "prompt": "a b c d e",
                "chosen": "<user> a b c d e <bot> f",
                "rejected": "<user> a b c d e <bot> g",
            },
            "the prompt twice",
        ),
        ({**CLEAN, "chosen": "<s> f"}, "more than one BOS"),
        ({**CLEAN, "rejected": "g <s>"}, "more than one BOS"),
        ({**CLEAN, "rejected": CLEAN["chosen"]}, "the same chosen and rejected"),
        ({**CLEAN, "rejected": ""}, "an empty completion"),
        ({**CLEAN, "prompt": "a " * 25}, "a prompt longer than max_length 20"),
    ],
)
def test_findings_name_the_row_and_the_fix(tokenizer, row, words):
    lines = [line for line in findings(row, tokenizer) if words in line]
    assert len(lines) == 1
    assert lines[0].startswith("mine: 2 of 4 rows ") and "(first: row 2); " in lines[0]
    assert "\n" not in lines[0]


def test_clean_rows_have_no_findings(tokenizer):
    assert findings(CLEAN, tokenizer) == []
    quoting = {"prompt": "a b c d e", "chosen": "f a b c d e", "rejected": "g"}
    assert findings(quoting, tokenizer) == []  # an answer may quote the prompt
    cut = {**CLEAN, "chosen": "f " * 30}
    assert findings(cut, tokenizer) == []  # without EOS, because it was cut


def test_missing_eos(tokenizer):
    prepared = list(prepare([CLEAN] * 3, tokenizer))
    for column in ("input_ids", "labels"):
        prepared[1][f"rejected_{column}"] = prepared[1][f"rejected_{column}"][:-1]
    (line,) = report_rows(prepared, tokenizer, max_length=20).findings
    assert "1 of 3 rows do not end in EOS (first: row 1)" in line
    tokenizer.eos_token = None
    lines = report_rows(prepare([CLEAN], tokenizer), tokenizer).findings
    assert lines == ["train_dataset: the tokenizer has no EOS token; set tokenizer.eos_token."]


def test_one_token_for_bos_and_eos_is_no_double_bos(tokenizer):
    tokenizer.bos_token = "</s>"
    assert findings(CLEAN, tokenizer) == []
    rows = list(prepare([CLEAN], tokenizer))
    rows[0]["chosen_input_ids"].insert(0, 2)
    rows[0]["chosen_labels"].insert(0, -100)
    assert "more than one BOS" in report_rows(rows, tokenizer).findings[0]


def test_tokens_are_counted_over_all_rows_and_texts_over_a_sample(tokenizer):
    same = {**CLEAN, "rejected": CLEAN["chosen"]}
    twice = {"prompt": "a b c d e", "chosen": "a b c d e f", "rejected": "a b c d e g"}
    prepared = prepare([CLEAN] * 89 + [same] * 10 + [twice], tokenizer)
    lines = report_rows(prepared, tokenizer, sample=100).findings
    assert "1 of 100 rows have the prompt twice" in lines[0] and "first: row 99" in lines[0]
    assert "10 of 100 rows have the same" in lines[1] and "first: row 89" in lines[1]
    (line,) = report_rows(prepared, tokenizer, sample=20).findings  # every fifth: not the last
    assert "10 of 100 rows have the same" in line
    report = report_rows(prepared.to_iterable_dataset(), tokenizer, sample=20)
    assert report.findings == [] and report.partial
    assert report.lines()[0].startswith("train_dataset: first 20 rows")


def test_rows_without_their_text(tokenizer):
    tokens = prepare([CLEAN] * 3, tokenizer).remove_columns(["prompt", "chosen", "rejected"])
    report = report_rows(tokens, tokenizer)
    assert (report.findings, report.texts, report.figures()["rows"]) == ([], 0, 3)
    assert report_rows(list(tokens), tokenizer).findings == []


def test_encoder_decoder_rows(tokenizer):
    builder = RowBuilder(tokenizer, is_encoder_decoder=True, max_completion_length=9)
    rows = [{**CLEAN, "chosen": "f g </s>", "rejected": "f g </s>"}]
    prepared = prepare_dataset(Dataset.from_list(rows), tokenizer, builder.tokenize_row)
    report = report_rows(prepared, tokenizer)
    (line,) = report.findings
    assert "the same chosen and rejected" in line
    assert report.figures()["tokens"]["prompt"]["max"] == 5


# ---- Figures ----


def test_figures_by_hand(tokenizer):
    rows = [
        {"prompt": "a b ", "chosen": "c d e", "rejected": "f"},  # 3, 4, 2 with BOS and EOS
        {"prompt": "a ", "chosen": "c", "rejected": "d e f g h"},  # 2, 2, 6
        {"prompt": "a b ", "chosen": "g", "rejected": "h"},  # 3, 2, 2; the first prompt again
    ]
    report = report_rows(prepare(rows, tokenizer), tokenizer, batch_size=3, max_length=20)
    figures = report.figures()
    assert figures["rows"] == 3
    tokens = figures["tokens"]
    assert tokens["prompt"] == {
        "min": 2, "p10": 2, "p50": 3, "p90": 3, "p99": 3, "max": 3, "mean": 2.7
    }  # fmt: skip
    assert [tokens["chosen"][key] for key in ("min", "p50", "max", "mean")] == [2, 2, 4, 2.7]
    assert [tokens["rejected"][key] for key in ("min", "p50", "max", "mean")] == [2, 2, 6, 3.3]
    positions = figures["positions"]
    # Sequences 7 5 4 8 5 5; the longest has 8, and a batch of three pairs has six of them.
    assert positions["packed"] == 34
    assert positions["padded"] == 48
    assert positions["shared_prompts"] == 26  # less 3 + 2 + 3
    assert positions["pad_share"] == round(14 / 48, 4)
    assert positions["sharing_factor"] == round(34 / 26, 4)
    assert figures["repeated_prompts"] == 1
    assert figures["near_duplicate_prompts"] == 0
    text = str(report)
    assert "train_dataset: 3 rows, 34 tokens" in text
    assert "padding: 29% of positions in batches of 3 pairs" in text
    assert "1.31x fewer tokens; both: 1.85x" in text


def test_chunks_of_any_size_make_the_same_figures(tokenizer, monkeypatch):
    rng = np.random.default_rng(2)

    def words(low, high):
        return " ".join(rng.choice(WORDS[3:29], rng.integers(low, high)))

    rows = [
        {"prompt": words(1, 12) + " ", "chosen": words(0, 9), "rejected": words(1, 9)}
        for _ in range(120)
    ]
    rows += rows[:7]
    prepared = prepare(rows, tokenizer)
    expected = report_rows(prepared, tokenizer, max_length=20).figures()
    assert expected["repeated_prompts"] >= 7
    for size in (1, 7, 50):
        monkeypatch.setattr("oddsmith.inspection.report.CHUNK", size)
        assert report_rows(prepared, tokenizer, max_length=20).figures() == expected
    assert report_rows(list(prepared), tokenizer, max_length=20).figures() == expected
    # A selection has an indices table and more than one chunk.
    again = prepared.select(range(127))
    assert report_rows(again, tokenizer, max_length=20).figures() == expected


def test_near_duplicate_prompts(tokenizer):
    # 52 tokens; another one changes 3 of their shingles, so 53 of 59 remain.
    alphabet = WORDS[3:29]
    long = " ".join(alphabet + alphabet[::-1]) + " "
    rows = [
        {**CLEAN, "prompt": long},
        {**CLEAN, "prompt": long.replace("a b", "b b")},
        {**CLEAN, "prompt": " ".join(alphabet[::2] * 4) + " "},
    ]
    report = report_rows(prepare(rows, tokenizer, 60), tokenizer, max_length=60)
    assert report.figures()["near_duplicate_prompts"] == 1
    assert report.stats.similar.first == 1
    assert "repeated prompts: 0; similar to an earlier one: 1" in str(report)


def test_overlength_rows_are_in_the_report(tokenizer):
    stats = TokenStats(1, 2, 20, near_duplicates=False)
    stats.add(TokenRows.of_rows(list(prepare([CLEAN] * 6, tokenizer))))
    assert "2 rows truncated (max_length 20): 33.3%" in str(DataReport("x", stats, overlength=2))
    dropped = DataReport("x", stats, overlength=2, policy="drop")
    assert "2 rows dropped (max_length 20): 25.0%" in str(dropped)  # of 8
    assert "truncated" not in str(DataReport("x", stats))


# ---- oddsmith inspect ----


def test_rows_with_images(tokenizer):
    rows = list(prepare([CLEAN, CLEAN], tokenizer))
    report = report_rows(rows, tokenizer, max_length=20, batch_size=2, images=[3, 0])
    assert report.figures()["images"] == {"rows": 1, "images": 3}
    (line,) = [line for line in report.lines() if "images" in line]
    assert "images: 3 in 1 of 2 rows" in line and "keep their padding: 0% of positions" in line
    assert not any("prompts computed once" in line for line in report.lines())
    text = report_rows(rows, tokenizer, max_length=20, batch_size=2)
    assert text.figures()["images"] is None and "images:" not in str(text)


def test_answers_that_were_cut_under_a_prompt_limit_need_no_eos(tokenizer):
    builder = RowBuilder(tokenizer, 20, 6)
    row = {"prompt": "a b c d e f g h ", "chosen": "f " * 30, "rejected": "g"}
    short = {**CLEAN, "prompt": "a ", "chosen": "f " * 30}  # 2 + 14 tokens, fewer than 20
    dataset = Dataset.from_list([CLEAN, row, short])
    prepared = prepare_dataset(dataset, tokenizer, builder.tokenize_row, name="mine")
    for rows, notes in ((prepared, builder.notes["mine"]), (list(prepared), None)):
        made = report_rows(rows, tokenizer, max_length=20, notes=notes, max_prompt_length=6)
        assert made.findings == []
    # A row that was not cut still needs it.
    notes = RowNotes(cut=np.array([False, True, False]))
    (line,) = report_rows(
        prepared, tokenizer, max_length=20, notes=notes, max_prompt_length=3
    ).findings
    assert "1 of 3 rows do not end in EOS (first: row 2)" in line


def test_an_empty_prompt_without_bos(tokenizer):
    tokenizer.bos_token = None
    (line,) = findings({**CLEAN, "prompt": ""}, tokenizer)
    assert "2 of 4 rows have an empty prompt and no BOS token" in line


def test_columns_that_are_not_used(tokenizer):
    notes = RowNotes(unused=("system", "explanation"))
    report = report_rows(prepare([CLEAN], tokenizer), tokenizer, notes=notes)
    (line,) = report.findings
    assert line.startswith("train_dataset: the column system has text that is not trained on;")
    assert "  not used: the columns system, explanation have text" in str(report)
    assert report.figures()["unused_columns"] == ["system", "explanation"]


def test_a_prompt_that_is_there_twice_as_messages(tokenizer):
    notes = RowNotes(repeated=[3, 5], repeated_of=9)
    (line,) = report_rows(prepare([CLEAN], tokenizer), tokenizer, notes=notes).findings
    assert "2 of 9 rows have the prompt twice" in line and "(first: row 3)" in line


def test_figures_are_one_message_that_verbosity_silences(tokenizer, log):
    shown, handler = [], logging.Handler()
    handler.emit = shown.append
    FIGURES.addHandler(handler)
    same = {**CLEAN, "rejected": CLEAN["chosen"]}
    reports = [report_rows(prepare([same], tokenizer), tokenizer, name=name) for name in "ab"]
    try:
        for level in (logging.WARNING, logging.INFO):
            log_report(logging.getLogger("oddsmith"), reports, level)
    finally:
        FIGURES.removeHandler(handler)
        FIGURES.setLevel(logging.NOTSET)
    assert [record.levelname for record in shown] == ["INFO"]
    assert shown[0].getMessage() == "\n".join(map(str, reports))
    assert log.text.count("a: 1 of 1 rows have the same chosen and rejected completion") == 2
