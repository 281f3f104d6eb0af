"""Figures in Markdown, and the rows of benches/results.csv that they are taken from.

A table or paragraph with measured figures is followed by `<!-- results: id, id -->`, the ids of its rows. One
whose figures are no measurements has `<!-- not measured: reason -->` after it, or before it.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMENT = re.compile(r"<!--\s*(results|not measured):\s*(.*?)\s*-->", re.DOTALL)
# Seconds and megabytes; other units stand for themselves.
SCALES = {
    **{"s": (1.0, "s"), "ms": (1e-3, "s"), "us": (1e-6, "s"), "ns": (1e-9, "s")},
    **{"MB": (1.0, "MB"), "GB": (1e3, "MB"), "KB": (1e-3, "MB")},
    **{"minutes": (60.0, "s"), "hours": (3600.0, "s")},
    "rows per second": (1.0, "rows/s"),
}
WORDS = dict(zip("two three four five six seven eight nine ten".split(), range(2, 11)))
UNITS = "rows per second|rows/s|tokens/s|TFLOP/s|GFLOP/s|GB/s|MB/s|ms|us|ns|s|KB|MB|GB"
NUMBER = r"(?<![\w.,])([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
# `4096 x 4096` is a shape, `4.1x` a ratio; `8-bit` and `0.50.2` are no figures.
IN_TABLE = re.compile(rf"{NUMBER}(?:(x)| ?({UNITS}|%))?(?![\w%])(?!\.\d)(?!-\w)")
IN_PROSE = re.compile(rf"{NUMBER}(?:(x)| ?({UNITS}))(?!\w)")
ROUND = re.compile(rf"\b(\d+|{'|'.join(WORDS)})()[ -](minutes|hours)\b")


@dataclass(frozen=True)
class Figure:
    """A number as it is printed."""

    text: str
    value: float
    unit: str | None
    # Half of its last digit.
    rounding: float

    @classmethod
    def read(cls, match: re.Match) -> "Figure":
        digits = str(WORDS.get(match[1], match[1])).replace(",", "")
        decimals = len(digits.partition(".")[2])
        return cls(match[0], float(digits), match[2] or match[3], 0.5 * 10**-decimals)

    def is_near(self, value: float) -> bool:
        return abs(self.value - value) <= self.rounding * 1.001


@dataclass
class Block:
    """A table or a paragraph, and the comment that belongs to it."""

    line: int
    lines: list[str] = field(default_factory=list)
    ids: list[str] | None = None
    excused: bool = False

    @property
    def is_table(self) -> bool:
        return self.lines[0].lstrip().startswith("|")

    def figures(self) -> Iterator[Figure]:
        if not self.is_table:
            text = re.sub(r"`[^`]*`", "", " ".join(line.strip() for line in self.lines))
            yield from map(Figure.read, IN_PROSE.finditer(text))
            if self.ids is not None:  # elsewhere "two minutes" is no measurement
                yield from map(Figure.read, ROUND.finditer(text))
            return
        # Neither the header nor the first column: they say what is measured.
        for line in self.lines[2:]:
            for cell in line.strip().strip("|").split("|")[1:]:
                yield from map(Figure.read, IN_TABLE.finditer(re.sub(r"`[^`]*`", "", cell)))


def blocks(text: str) -> list[Block]:
    """Tables and paragraphs of a page, without its code."""

    def blank(match: re.Match) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"^( *)```.*?^\1```$", blank, text, flags=re.DOTALL | re.MULTILINE)
    found: list[Block] = []
    # Comments on lines of their own, with as many lines as they had.
    pieces, end = [], 0
    for match in COMMENT.finditer(text):
        pieces += [text[end : match.start()], match]
        end = match.end()
    excused, line = False, 1
    for piece in [*pieces, text[end:]]:
        if isinstance(piece, re.Match):
            line += piece[0].count("\n")
            excused = piece[1] == "not measured"
            if found and excused:
                found[-1].excused = True
            elif found:
                names = re.split(r"[,\s]+", piece[2].strip(" ,\n"))
                found[-1].ids = (found[-1].ids or []) + names
            continue
        for group in itertools.groupby(
            enumerate(piece.split("\n"), line),
            key=lambda pair: (not pair[1].strip(), pair[1].lstrip().startswith("|")),
        ):
            (is_blank, _), numbered = group[0], list(group[1])
            if not is_blank:
                found.append(Block(numbered[0][0], [text for _, text in numbered]))
                found[-1].excused, excused = excused, False
        line += piece.count("\n")
    return found


def matching(figure: Figure, rows: list[dict[str, str]]) -> set[str]:
    """The ids of the rows that a figure can be taken from: of one, or of two whose ratio it is."""
    scale, unit = SCALES.get(figure.unit, (1.0, figure.unit))
    ids = set()
    for row in rows:
        row_scale, row_unit = SCALES.get(row["unit"], (1.0, row["unit"]))
        if unit is None:
            alike, value = True, float(row["p50"])
        else:
            alike, value = row_unit == unit, float(row["p50"]) * row_scale / scale
        if alike and figure.is_near(value):
            ids.add(row["id"])
    if unit == "x":
        same = ("metric", "unit", "machine", "date", "bench")
        for a, b in itertools.permutations(rows, 2):
            if all(a[key] == b[key] for key in same) and float(b["p50"]):
                if figure.is_near(float(a["p50"]) / float(b["p50"])):
                    ids |= {a["id"], b["id"]}
    return ids


def faults(text: str, rows: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with the figures of a page, a line each."""
    found = []
    for block in blocks(text):
        figures = list(block.figures())
        if block.ids is None:
            # A number without a unit may be a setting.
            with_unit = [figure.text for figure in figures if figure.unit]
            if with_unit and not block.excused:
                shown = ", ".join(with_unit[:4])
                found.append(f"line {block.line}: no rows are named for {shown}")
            continue
        if missing := [id for id in block.ids if id not in rows]:
            found.append(f"line {block.line}: results.csv has no row {', '.join(missing)}")
            continue
        named, used = [rows[id] for id in block.ids], set()
        for figure in figures:
            ids = matching(figure, named)
            used |= ids
            if not ids:
                found.append(f"line {block.line}: {figure.text} is in none of the rows named")
        if idle := [id for id in block.ids if id not in used]:
            found.append(f"line {block.line}: no figure is taken from {', '.join(idle)}")
    return found
