"""Columns of scored or ranked answers under the names that public datasets have."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..data.layouts import QUESTIONS
from .scored import Columns

# A list of answers per row: column, key of the text, column or key of the score, of the rank.
_LISTS = (
    Columns(responses="answers", text_key="answer", rank_key="rank"),  # Nectar
    Columns(responses="answers", text_key="text", score_key="pm_score"),  # Stack Exchange
    Columns(responses="generations", scores="ratings"),  # distilabel
    Columns(responses="generations", scores="rating"),
    Columns(responses="all_generated_responses", scores="all_rm_scores"),
    Columns(responses="responses", scores="scores"),
    Columns(responses="responses", scores="ratings"),
    Columns(responses="responses", ranks="ranks"),
    Columns(responses="completions", scores="scores"),
)
# One answer per row; the rows of a prompt are joined.
_SINGLE = (
    Columns(response="response", scores="helpfulness"),  # HelpSteer
    Columns(response="completion", scores="label"),  # KTO: true or false
    Columns(response="response", scores="score"),
    Columns(response="response", scores="rating"),
    Columns(response="response", scores="reward"),
)


def find_columns(fields: Mapping[str, Any], columns: Columns) -> Columns | None:
    """
    The columns of scored answers in a row, by their usual names.

    Args:
        fields (`Mapping[str, Any]`): A row.
        columns (`Columns`): What the user named; the prompt and the language are kept.

    Returns:
        `Columns` or `None`: `None` if there are none, or no prompt.
    """
    prompt = columns.prompt
    if prompt not in fields:
        prompt = next((name for name in QUESTIONS if isinstance(fields.get(name), str)), None)
    if prompt is None:
        return None
    for known in _LISTS:
        if isinstance(fields.get(known.responses or ""), list) and _fits(fields, known):
            return replace(known, prompt=prompt, lang=columns.lang)
    for known in _SINGLE:
        if isinstance(fields.get(known.response or ""), str) and known.scores in fields:
            return replace(known, prompt=prompt, lang=columns.lang)
    return None


def _fits(fields: Mapping[str, Any], known: Columns) -> bool:
    answers = fields[known.responses or ""]
    if known.text_key is not None:
        keys = {known.text_key, known.score_key or known.rank_key}
        return bool(answers) and isinstance(answers[0], Mapping) and keys <= set(answers[0])
    own = fields.get(known.scores or known.ranks or "")
    return isinstance(own, list) and all(isinstance(answer, str) for answer in answers)


def describe(columns: Columns) -> str:
    """One line about the columns that were found."""
    answers = columns.responses or columns.response
    if columns.text_key is not None:
        answers = f"{answers}.{columns.text_key}"
    order = columns.scores or columns.score_key
    what = f"{order} the scores" if order else f"{columns.ranks or columns.rank_key} the ranks"
    return f"{columns.prompt} is the prompt, {answers} the answers, {what}"
