"""Parsing of `optim_args`."""

import pytest

from oddsmith.optim.low_rank.apollo import APOLLOAdamW
from oddsmith.optim.low_rank.galore import GaLoreAdamW
from oddsmith.training.optim_args import parse_optim_args, readers, yes_or_no


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank", "'rank'; must be option=value"),
        ("rank=", "must be option=value"),
        ("ranks=4", "the unknown option 'ranks'; known are"),
        ("rank=4,rank=5", "'rank' twice"),
        ("rank=four", "rank is 'four' in optim_args; must be an integer"),
        ("scale=big", "scale is 'big' in optim_args; must be a number"),
        ("adaptive_gap=maybe", "must be true or false"),
    ],
)
def test_bad_optim_args(text, message):
    with pytest.raises(ValueError, match=message):
        parse_optim_args(text, readers(GaLoreAdamW), "galore_adamw")


def test_optim_args():
    known = readers(GaLoreAdamW)
    text = "rank=64, svd=exact,adaptive_gap=True,overlap_threshold=0.5,"
    assert parse_optim_args(text, known, "x") == {
        "rank": 64, "svd": "exact", "adaptive_gap": True, "overlap_threshold": 0.5,
    }  # fmt: skip
    assert parse_optim_args(None, known, "x") == parse_optim_args("", known, "x") == {}


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("FALSE", False), ("0", False)]
)
def test_booleans(text, value):
    assert yes_or_no(text) is value


@pytest.mark.parametrize("text", ["yes", "2", ""])
def test_other_texts_are_not_booleans(text):
    with pytest.raises(ValueError, match="must be true or false"):
        yes_or_no(text)


def test_options_are_those_of_the_optimizer():
    galore, apollo = readers(GaLoreAdamW), readers(APOLLOAdamW)
    assert set(galore) == set(GaLoreAdamW.group_options)
    assert "svd" in galore and "svd" not in apollo and "scale_type" in apollo
    assert galore["rank"]("12") == 12 and galore["scale"]("0.25") == 0.25
    assert galore["proj_type"]("std") == "std"
