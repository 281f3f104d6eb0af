"""The text of `optim_args` to its values."""

import pytest

from oddsmith.optim.low_rank.galore import GaLoreAdamW
from oddsmith.training.optim_args import parse_optim_args, readers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank", "'rank'; must be option=value"),
        ("rank=", "must be option=value"),
        ("ranks=4", "'ranks', which is no option; there are"),
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
