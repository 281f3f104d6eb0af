"""`oddsmith prepare`: makes curated pairs for training from other preference data."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import UserError
from ..sources.json_records import LONGEST
from ..sources.stream import RecordStream
from ..stage import staged_file
from .curation import REASONS, Curator, Rules
from .diversity import Diversity
from .formats import FORMATS, ReadOptions, columns_taken, read_units
from .pair import Unit
from .pair_file import PairFile, format_of

# Units per batch: sketches of many prompts are computed at once.
_BATCH = 256
# Recommendation: "at least 10,000 unique prompts for a general-purpose model".
ENOUGH_PROMPTS = 10_000


@dataclass
class Ledger:
    """
    Counts every input row once: kept, or dropped for a reason.

    Args:
        kept (`int`): Rows with a written pair.
        dropped (`Counter`): Rows by reason.
        pairs (`int`): Written pairs.
        pairs_dropped (`Counter`): Pairs by reason; one row can make several.
    """

    kept: int
    dropped: Counter
    pairs: int
    pairs_dropped: Counter

    @property
    def rows(self) -> int:
        return self.kept + sum(self.dropped.values())

    def enter(self, unit: Unit, outcomes: list[str | None]) -> None:
        """
        Counts the rows and pairs of a unit.

        Raises:
            RuntimeError: If the counts do not add up to the number of rows, or a reason is not one
                of `REASONS`. This is a bug; the run stops instead of reporting a wrong count.
        """
        entered = 0
        for reason, count in unit.fates(outcomes):
            entered += count
            if reason is None:
                self.kept += count
            else:
                self.dropped[reason] += count
        unknown = set(self.dropped) - set(REASONS)
        if entered != unit.rows or unknown:
            raise RuntimeError(
                f"{unit.where}: {entered} of {unit.rows} rows are accounted for {unknown or ''}"
            )
        self.pairs += outcomes.count(None)
        self.pairs_dropped.update(reason for reason in outcomes if reason is not None)


class _Counted:
    """Passes records through and counts them, with a progress bar over the bytes of the files."""

    def __init__(self, streams: list[RecordStream]):
        self.streams, self.rows = streams, 0
        self.first: dict[str, Any] | None = None  # the first row that can be read

    def __iter__(self) -> Iterator[Any]:
        sizes = [stream.size for stream in self.streams if stream.size is not None]
        known = len(sizes) == len(self.streams)
        with tqdm(
            total=sum(sizes) if known else None,
            desc="reading",
            unit="B" if known else "rows",
            unit_scale=True,
            delay=1.0,
        ) as bar:
            for record in chain.from_iterable(self.streams):
                self.rows += 1
                self.first = self.first or record.fields
                if self.rows % 256 == 0:
                    done = sum(stream.done for stream in self.streams) if known else self.rows
                    bar.update(done - bar.n)
                yield record
            bar.update((sum(sizes) if known else self.rows) - bar.n)


def run_prepare(
    datasets: list[str],
    output: str | Path,
    options: ReadOptions | None = None,
    rules: Rules | None = None,
    *,
    config: str | None = None,
    split: str | None = None,
    overwrite: bool = False,
    temp_dir: str | Path | None = None,
    longest: int = LONGEST,
) -> dict[str, Any]:
    """
    Reads preference data, drops rows that are not useful, and writes the rest as pairs.

    The file has the columns `prompt`, `chosen` and `rejected`, which are lists of messages (or
    strings, if the input has chosen and rejected strings), and scores if there are any. The file
    and its summary appear when they are complete; a failed run writes nothing.

    Args:
        datasets (`list[str]`): Files, folders, or hub ids, all of one format.
        output (`str` or `Path`): `.jsonl`, `.jsonl.gz` or `.parquet`. The summary is next to it,
        `NAME.summary.json`.
        options ([`ReadOptions`], *optional*): How to read the input.
        rules ([`Rules`], *optional*): Which pairs are kept.
        config (`str`, *optional*): Configuration of hub datasets.
        split (`str`, *optional*): Split to read; see [`RecordStream`].
        overwrite (`bool`, *optional*): Replace an existing file.
        temp_dir (`str` or `Path`, *optional*): Folder of temporary files; the system's if not
            given.
        longest (`int`, *optional*, defaults to 64 MB): Most bytes of a row of a JSON file.

    Returns:
        `dict[str, Any]`: The summary, as in the file.

    Raises:
        UserError: If the input cannot be read, has a bad row or no pairs, or the output cannot be
            written.
    """
    options, rules, output = options or ReadOptions(), rules or Rules(), Path(output).expanduser()
    suffix = format_of(output)
    summary_path = output.with_name(output.name[: -len(suffix)] + ".summary.json")
    for path in (output, summary_path):
        if path.exists() and not overwrite:
            raise UserError(f"--output {output}: {path} exists; --overwrite replaces it")
    streams = [RecordStream(name, config, split, longest) for name in datasets]
    folder = None if temp_dir is None else Path(temp_dir)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--temp_dir {folder}: no such folder")

    counted = _Counted(streams)
    kind, units = read_units(counted, options)
    ledger, diversity = Ledger(0, Counter(), 0, Counter()), Diversity()
    curator, made = Curator(rules, folder), 0
    try:
        with PairFile(output) as file:
            for batch in _batches(units):
                made += len(batch)
                for unit, outcomes in zip(batch, curator.judge(batch), strict=True):
                    ledger.enter(unit, outcomes)
                    for pair, reason in zip(unit.pairs, outcomes, strict=True):
                        if reason is None:
                            file.write(pair)
                            diversity.add(pair)
            _check(made if kind == "oasst_trees" else ledger.rows, counted.rows)
            summary = {
                "datasets": datasets,
                "format": kind,
                "columns": columns_taken(kind, counted.first or {}, options),
                "rows": {
                    "read": ledger.rows,
                    "kept": ledger.kept,
                    "dropped": in_order(ledger.dropped),
                },
                "pairs": {"written": ledger.pairs, "dropped": in_order(ledger.pairs_dropped)},
                "rules": {**asdict(rules), "languages": sorted(rules.languages)},
                "without_scores": {"pairs": curator.unscored, "of": curator.judged},
                "diversity": diversity.report(curator.distinct, curator.near),
                "output": str(output),
            }
            if not ledger.pairs:
                raise UserError(
                    f"none of {ledger.rows} rows is kept, so nothing is written:\n"
                    + format_dropped(summary)
                )
        write_json(summary, summary_path)
    finally:
        curator.close()
    print(format_summary(summary))
    return summary


def _batches(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    units = iter(units)
    while batch := list(islice(units, _BATCH)):
        yield batch


def _check(entered: int, read: int) -> None:
    # A ready tree has several messages, which are counted; there, the trees must add up.
    if entered != read:
        raise RuntimeError(f"{read} rows were read and {entered} accounted for")


def in_order(dropped: Counter) -> dict[str, int]:
    return {reason: dropped[reason] for reason in REASONS if dropped[reason]}


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes a JSON file, which appears when it is complete."""
    with staged_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def format_dropped(summary: dict[str, Any]) -> str:
    rows = summary["rows"]["dropped"]
    return "\n".join(
        f"  {count:>10,}  {reason}: {REASONS[reason]}" for reason, count in rows.items()
    )


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as text."""
    rows, pairs, figures = summary["rows"], summary["pairs"], summary["diversity"]
    dropped = rows["read"] - rows["kept"]
    lines = [
        f"read     {rows['read']:>10,}  {FORMATS[summary['format']]}",
        *([f"columns              {summary['columns']}"] if summary["columns"] else []),
        f"kept     {rows['kept']:>10,}  ({rows['kept'] / max(rows['read'], 1):.1%})",
        f"dropped  {dropped:>10,}",
    ]
    if dropped:
        lines.append(format_dropped(summary))
    lines.append(f"pairs    {pairs['written']:>10,}  written to {summary['output']}")
    without = summary["without_scores"]
    if without["pairs"]:
        lines.append(
            f"                     {without['pairs']:,} of {without['of']:,} pairs have no score: "
            "--min_score and --min_gap cannot drop them"
        )
    if sum(pairs["dropped"].values()):
        others = ", ".join(f"{count:,} {reason}" for reason, count in pairs["dropped"].items())
        lines.append(f"                     not written: {others}")
    lines.append(
        f"prompts  {figures['distinct_prompts']:>10,}  distinct, "
        f"{figures['near_duplicate_prompts']:,} of them similar to an earlier one"
    )
    if figures["distinct_prompts"] < ENOUGH_PROMPTS:
        lines.append(
            f"                     a general model needs about {ENOUGH_PROMPTS:,} or more, a specialised "
            "one can need fewer"
        )
    lines.append("characters      min     p10     p50     p90     p99     max    mean")
    for side, values in figures["characters"].items():
        lines.append(
            f"  {side:<10}" + "".join(f"{value:>8,.0f}" for value in values.values()).rstrip()
        )
    lines.append(
        f"words (of {figures['sampled_pairs']:,} pairs)   type-token ratio   distinct-1, -2, -3"
    )
    for side in ("prompt", "chosen"):
        words = figures[f"{side}_words"]
        ratio, *grams = ("-" if value is None else f"{value:.3f}" for value in words.values())
        lines.append(f"  {side:<24}{ratio:>16}   {' '.join(grams)}")
    return "\n".join(lines)
