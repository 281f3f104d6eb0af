"""Functions that the parsers share."""

import argparse

import pytest

from oddsmith.cli.flags import add, positive


def test_a_flag_has_both_spellings():
    parser = argparse.ArgumentParser()
    add(parser, "min_score", type=float)
    add(parser, "split")
    for flag in ("--min_score", "--min-score"):
        assert parser.parse_args([flag, "0.5"]).min_score == 0.5
    assert parser.parse_args(["--split", "x"]).split == "x"
    # One spelling is not listed twice.
    assert parser.format_help().count("--split") == 2


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("042", 42)])
def test_positive(text, number):
    assert positive(text) == number


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "", "ten", "1e3"])
def test_anything_else_is_refused_with_what_was_given(text):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        positive(text)
    assert str(error.value) == f"{text!r} is not a whole number above 0"
