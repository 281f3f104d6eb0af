"""Detection of formats, and combinations of options."""

import pytest

from oddsmith.errors import UserError
from oddsmith.prepare.formats import FORMATS, ReadOptions, detect_format, read_units
from oddsmith.prepare.pair import assistant
from oddsmith.prepare.scored import Columns
from oddsmith.sources.records import Record


def test_formats_are_told_apart():
    assert set(FORMATS) == {"pairs", "hh", "ultrafeedback", "oasst", "oasst_trees", "scored",
                            "responses", "comparisons"}  # fmt: skip
    with pytest.raises(
        UserError, match="x line 3: the format cannot be detected from the columns a, b"
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


def test_the_first_row_that_can_be_read_tells_the_format():
    row = {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    damaged = [Record(None, "x", "line", number, "not JSON") for number in range(1, 101)]
    records = [*damaged[:2], Record(row, "x", "line", 3)]
    with pytest.raises(UserError, match="x line 1: not JSON"):
        read_units(records, ReadOptions())
    kind, units = read_units(records, ReadOptions(stop_at_bad_rows=False))
    assert kind == "pairs"
    assert [unit.reason for unit in units] == ["bad row", "bad row", None]
    with pytest.raises(UserError, match="x line 100: none of the first 100 lines can be read"):
        read_units(damaged, ReadOptions(stop_at_bad_rows=False))
    kind, units = read_units(damaged[:3], ReadOptions(stop_at_bad_rows=False))
    assert [unit.reason for unit in units] == ["bad row"] * 3
