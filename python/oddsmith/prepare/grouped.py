"""The format with one answer per row: rows of the same prompt are grouped on disk."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..sources.records import Record
from .pair import BadRow, Unit, bad_unit, fields_of, required, text_of, text_or_messages
from .ready import language_of
from .scored import Columns, make_answer, make_pairs
from .scratch import scratch_database


class GroupedUnit(Unit):
    """Rows with one answer each to the same prompt; a row is kept if its answer is in a pair."""

    __slots__ = ("members",)

    members: list[tuple[str, bool]]

    def fates(self, outcomes: Sequence[str | None]) -> Iterator[tuple[str | None, int]]:
        """As `Unit.fates`, for each row separately."""
        if not self.pairs:
            yield self.reason, self.rows
            return
        best: dict[str, str | None] = {}
        for pair, outcome in zip(self.pairs, outcomes, strict=True):
            for side in (pair.chosen, pair.rejected):
                text = side if isinstance(side, str) else side[0]["content"]
                if text not in best or outcome is None:
                    best[text] = outcome
        for text, scored in self.members:
            unpaired = "neither best nor worst" if scored else "no score or rank"
            yield (best.get(text, unpaired) if scored else unpaired), 1


def group_responses(
    records: Iterable[Record], columns: Columns, pairing: str, stop: bool, folder: Path | None
) -> Iterator[Unit]:
    """
    Units of rows with one answer each, grouped by their prompt on disk.

    Args:
        records (`Iterable[Record]`): Input.
        columns (`Columns`): Names of the columns.
        pairing (`str`): See [`make_pairs`].
        stop (`bool`): Whether a bad row is an error.
        folder (`Path`, *optional*): Folder of the temporary file.

    Raises:
        UserError: For a bad row, if `stop`.
    """
    response = columns.response
    if response is None:
        raise ValueError("columns.response is None; must name the column of the answers")
    with scratch_database(folder) as store:
        store.execute(
            "CREATE TABLE answers (prompt, text, score, rank, lang, source, unit, number)"
        )
        for record in records:
            try:
                fields = fields_of(record)
                prompt = text_or_messages(required(fields, columns.prompt), columns.prompt)
                text = text_of(required(fields, response), response)
                score, rank = (
                    json.dumps(None if name is None else _number(fields.get(name)))
                    for name in (columns.scores, columns.ranks)
                )
                make_answer(
                    text, json.loads(score), json.loads(rank), response
                )  # raises for a bad row
            except BadRow as bad:
                yield bad_unit(record, bad, stop)
                continue
            store.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    json.dumps(prompt),
                    text,
                    score,
                    rank,
                    language_of(fields, columns.lang),
                    record.source,
                    record.unit,
                    record.number,
                ),
            )
        store.execute("CREATE INDEX by_prompt ON answers (prompt)")
        prompts = store.execute("SELECT prompt FROM answers GROUP BY prompt ORDER BY MIN(rowid)")
        ranked = columns.ranks is not None
        for (prompt,) in prompts:
            rows = store.execute(
                "SELECT text, score, rank, lang, source, unit, number FROM answers WHERE prompt = ? "
                "ORDER BY rowid",
                (prompt,),
            ).fetchall()
            first = Record(None, *rows[0][4:])
            answers = [
                make_answer(text, json.loads(score), json.loads(rank), response)
                for text, score, rank, *_ in rows
            ]
            scored = [answer for answer in answers if answer is not None]
            try:
                found = make_pairs(json.loads(prompt), scored, pairing, rows[0][3], ranked)
            except BadRow as bad:
                found = bad_unit(first, bad, stop)
            if isinstance(found, Unit):
                yield Unit(first.where, reason=found.reason, rows=len(rows))
                continue
            unit = GroupedUnit(first.where, found, rows=len(rows))
            unit.members = [
                (row[0], answer is not None) for row, answer in zip(rows, answers, strict=True)
            ]
            yield unit


def _number(score: Any) -> Any:
    # KTO's labels are true for the better answers.
    return int(score) if isinstance(score, bool) else score
