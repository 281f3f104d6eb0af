"""Functions that the parsers share. Standard library only, so that help is fast."""

import argparse
from typing import Any


def add(parser: Any, flag: str, **settings: Any) -> None:
    """Adds a flag in both spellings, `--min_score` and `--min-score`."""
    spellings = [f"--{flag}", f"--{flag.replace('_', '-')}"]
    parser.add_argument(*dict.fromkeys(spellings), dest=flag, **settings)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
