"""The report on a dataset: figures against their definitions, findings one by one."""

import json

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oddsmith import cli
from oddsmith.data.dataset import prepare_dataset
from oddsmith.data.rows import RowBuilder
from oddsmith.errors import UserError
from oddsmith.inspection.histogram import draw_bars, edges_of, save_histogram
from oddsmith.inspection.report import DataReport, report_rows
from oddsmith.inspection.run import run_inspect
from oddsmith.inspection.token_stats import Ragged, TokenRows, TokenStats, padded_tokens, quantiles

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "<user>", "<bot>"]
CLEAN = {"prompt": "a b c d e ", "chosen": "f g", "rejected": "h i"}


@pytest.fixture
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


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
        ({**CLEAN, "prompt": "a " * 25}, "longer than max_length 20 by their prompt alone"),
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
    assert findings(cut, tokenizer) == []  # without EOS, for it was cut


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
    assert "pads: 29% of the positions of batches of 3 pairs" in text
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
    # 52 tokens; another one changes 3 of their shingles, of which 53 are left of 59.
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
    assert "prompts seen before: 0; like one before: 1" in str(report)


def test_overlength_rows_are_in_the_report(tokenizer):
    stats = TokenStats(1, 2, 20, near_duplicates=False)
    stats.add(TokenRows.of_rows(list(prepare([CLEAN] * 6, tokenizer))))
    assert "2 rows truncated (max_length 20): 33.3%" in str(DataReport("x", stats, overlength=2))
    dropped = DataReport("x", stats, overlength=2, policy="drop")
    assert "2 rows dropped (max_length 20): 25.0%" in str(dropped)  # of 8
    assert "truncated" not in str(DataReport("x", stats))


def test_padded_tokens():
    chosen, rejected = np.array([3, 9, 4, 4]), np.array([5, 1, 4, 2])
    assert padded_tokens(chosen, rejected, 1) == 2 * (5 + 9 + 4 + 4)
    assert padded_tokens(chosen, rejected, 9) == 2 * 4 * 9
    # Three and one: the 9 is alone or with two others.
    assert padded_tokens(chosen, rejected, 3) in {2 * (3 * 5 + 9), 2 * (3 * 9 + 4), 2 * (3 * 9 + 5)}
    assert padded_tokens(chosen[:0], rejected[:0], 3) == 0
    assert quantiles(chosen[:0]) == {}


def test_ragged():
    ragged = Ragged.of_lists([[5, 6, 7], [], [8], [9, 9]])
    assert ragged.at(0).tolist() == [5, -1, 8, 9]
    assert ragged.at(1).tolist() == [6, -1, -1, 9]
    assert ragged.at(-1).tolist() == [7, -1, 8, 9]
    assert ragged.at(-2).tolist() == [6, -1, -1, 9]
    assert ragged.sums(ragged.values >= 7).tolist() == [1, 0, 1, 2]
    some = ragged.where(ragged.values != 6)
    assert (some.values.tolist(), some.lengths.tolist()) == ([5, 7, 8, 9, 9], [2, 0, 1, 2])
    assert Ragged.of_lists([]).at(0).tolist() == []


# ---- Histograms ----


def test_bars():
    lengths = np.array([3] * 8 + [15] * 4 + [29])
    assert draw_bars(lengths, "tokens", 17).splitlines() == [
        "tokens",
        "   0-4  ████████████████████████████████████████ 8",
        "   5-9                                           0",
        "  10-14                                          0",
        "  15-19 ████████████████████                     4  <- 17",
        "  20-24                                          0",
        "  25-29 █████                                    1",
    ]
    assert draw_bars(lengths[:0], "tokens") == "tokens: no rows"
    # A few rows far beyond the rest share the last bin.
    far = draw_bars(np.array([3] * 1000 + [10**6]), "tokens").splitlines()
    assert far[-1].split() == ["4+", "▏", "1"]


def test_edges_are_round_and_hold_the_longest():
    rng = np.random.default_rng(3)
    for top in (1, 7, 99, 1000, 123456):
        lengths = rng.integers(0, top, 500)
        edges = edges_of(lengths)
        step = int(edges[1])
        assert str(step).rstrip("0") in ("1", "2", "5")
        assert (np.diff(edges) == step).all() and edges[0] == 0
        assert edges[-1] > np.quantile(lengths, 0.99)
        assert len(edges) <= 15


def test_a_picture(tmp_path):
    path = save_histogram({"a": np.arange(90), "b": np.ones(3)}, tmp_path / "s" / "h.png", "t", 50)
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- oddsmith inspect ----


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_inspect_says_what_the_trainer_says(folder, tokenizer, tmp_path, capsys):
    rows = [
        CLEAN,
        {**CLEAN, "rejected": CLEAN["chosen"]},
        {**CLEAN, "chosen": "f " * 30},
        {"prompt": "a b c d e", "chosen": "a b c d e f", "rejected": "a b c d e g"},
        {**CLEAN, "prompt": "q r s t u v "},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    report = run_inspect(source, folder, max_length=20, batch_size=3)
    trainer = report_rows(
        prepare(rows, tokenizer), tokenizer, max_length=20, name=source, batch_size=3, overlength=1
    )
    assert report.figures() == trainer.figures()
    shown = capsys.readouterr().out
    assert shown.startswith(str(trainer) + "\n")
    assert "1 rows truncated (max_length 20): 20.0%" in shown
    assert "! 1 of 5 rows have the prompt twice" in shown and "(first: row 3)" in shown
    assert "█" in shown


def test_inspect_drops_what_training_would_drop(folder, tmp_path):
    same = {**CLEAN, "rejected": CLEAN["chosen"]}
    rows = [CLEAN, {**CLEAN, "chosen": "f " * 30}, same]
    report = run_inspect(
        write(tmp_path / "rows.jsonl", rows), folder, max_length=20, overlength="drop"
    )
    figures = report.figures()
    assert figures["rows"] == 2
    assert figures["overlength"] == {"rows": 1, "policy": "drop"}
    assert figures["findings"]["identical"] == {"rows": 1, "first": 2}  # of the file


def test_inspect_as_a_command(folder, tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "rows.jsonl", [CLEAN] * 5)
    picture = tmp_path / "lengths.png"
    argv = ["inspect", source, "--model", folder, "--json", "--histogram", str(picture)]
    assert cli.main([*argv, "--max-length", "30", "--rows", "3"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["max_length"], figures["partial"]) == (3, 30, True)
    assert figures["repeated_prompts"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([CLEAN, {"prompt": "a", "chosen": "b"}], "line 2: no field rejected; its fields are"),
        ([CLEAN, {**CLEAN, "chosen": 7}], "line 2: chosen is 7 (int); must be a string"),
        ([CLEAN, [1]], "line 2: a list; must be a JSON object"),
        ([], "is empty"),
    ],
)
def test_inspect_names_bad_rows(rows, words, folder, tmp_path):
    with pytest.raises(UserError) as error:
        run_inspect(write(tmp_path / "rows.jsonl", rows), folder)
    assert words in str(error.value) and "rows.jsonl" in str(error.value)


def test_inspect_needs_a_tokenizer_and_sane_lengths(folder, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [CLEAN])
    with pytest.raises(UserError, match="--model /no/such: no such folder"):
        run_inspect(source, "/no/such")
    with pytest.raises(UserError, match="max_prompt_length is 30; must be positive and below"):
        run_inspect(source, folder, max_length=20, max_prompt_length=30)
    with pytest.raises(UserError, match="--histogram x: needs a suffix"):
        run_inspect(source, folder, histogram="x")
    assert cli.main(["inspect", source, "--model", folder, "--max_length", "0"]) == 2
    assert "'0' is no whole number above 0" in capsys.readouterr().err


def test_inspect_uses_the_templates_that_train_would(folder, tmp_path, capsys):
    turn = [{"role": "user", "content": "a b"}]
    rows = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "content": "d e"}],
        }
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    # <s> [INST] a b [/INST] and c, d e, </s>; words apart, for the tokenizer knows no others.
    report = run_inspect(source, folder)
    assert report.figures()["rows"] == 1
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}")
    figures = run_inspect(source, folder, chat_template=str(template)).figures()
    assert [figures["tokens"][side]["max"] for side in ("prompt", "chosen", "rejected")] == [
        3,
        2,
        3,
    ]
