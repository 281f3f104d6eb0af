"""Formats with two answers and a verdict, such as SHP, SafeRLHF and Chatbot Arena."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..data.layouts import as_messages
from .pair import (
    BadRow,
    Messages,
    Pair,
    Unit,
    messages_of,
    number_of,
    required,
    shown,
    text_of,
    user,
)
from .pair import assistant as answered
from .ready import extract_messages, language_of


@dataclass(frozen=True)
class Comparison:
    """
    A format whose rows hold two answers.

    Args:
        name (`str`): Where it is known from.
        answers (`tuple[str, str]`): Columns of the answers, or of two conversations.
        verdict (`tuple[str, ...]`): Columns that say which is better.
        prefers (`Callable`): Of the row: above 0 if the first is better, below 0 if the second.
        prompt (`str`, *optional*): Column of the prompt; none if the answers are conversations.
        scores (`tuple[str, str]`, *optional*): Columns of the answers' scores.
    """

    name: str
    answers: tuple[str, str]
    verdict: tuple[str, ...]
    prefers: Callable[[Mapping[str, Any]], float]
    prompt: str | None = None
    scores: tuple[str, str] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns by which the format is recognised."""
        own = () if self.prompt is None else (self.prompt,)
        return tuple(dict.fromkeys((*own, *self.answers, *self.verdict)))

    def __str__(self) -> str:
        where = "" if self.prompt is None else f"{self.prompt} is the prompt, "
        return (
            f"{where}{' and '.join(dict.fromkeys(self.answers))} the answers, "
            f"{' and '.join(self.verdict)} the verdict"
        )


def _choice(column: str, first: Any, second: Any) -> Callable[[Mapping[str, Any]], float]:
    def prefers(fields: Mapping[str, Any]) -> float:
        value = fields.get(column)
        return 1.0 if value == first else -1.0 if value == second else 0.0

    return prefers


def _higher(first: str, second: str) -> Callable[[Mapping[str, Any]], float]:
    def prefers(fields: Mapping[str, Any]) -> float:
        values = [number_of(fields.get(name), name) for name in (first, second)]
        return 0.0 if values[0] is None or values[1] is None else values[0] - values[1]

    return prefers


def _below_zero(column: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda fields: -(number_of(fields.get(column), column) or 0.0)


COMPARISONS = (
    Comparison(
        "Stanford Human Preferences",
        ("human_ref_A", "human_ref_B"),
        ("labels",),
        _choice("labels", 1, 0),
        "history",
        ("score_A", "score_B"),
    ),
    Comparison(
        "PKU-SafeRLHF",
        ("response_0", "response_1"),
        ("better_response_id",),
        _choice("better_response_id", 0, 1),
        "prompt",
    ),
    Comparison(
        "AlpacaFarm",
        ("output_1", "output_2"),
        ("preference",),
        _choice("preference", 1, 2),
        "instruction",
    ),
    Comparison(
        "WebGPT",
        ("answer_0", "answer_1"),
        ("score_0", "score_1"),
        _higher("score_0", "score_1"),
        "question",
        ("score_0", "score_1"),
    ),
    Comparison(
        "HelpSteer3",
        ("response1", "response2"),
        ("overall_preference",),
        _below_zero("overall_preference"),
        "context",
    ),
    Comparison(
        "Chatbot Arena",
        ("conversation_a", "conversation_b"),
        ("winner",),
        _choice("winner", "model_a", "model_b"),
    ),
    Comparison(
        "Chatbot Arena, in columns",
        ("response_a", "response_b"),
        ("winner_model_a", "winner_model_b"),
        _higher("winner_model_a", "winner_model_b"),
        "prompt",
    ),
    Comparison(
        "OpenAI's summaries",
        ("summaries", "summaries"),
        ("choice",),
        _choice("choice", 0, 1),
        "info",
    ),
)


def find_comparison(fields: Mapping[str, Any]) -> Comparison | None:
    """The first of `COMPARISONS` whose columns a row has."""
    return next((each for each in COMPARISONS if set(each.columns) <= set(fields)), None)


def parse_comparison(
    fields: Mapping[str, Any], lang_column: str | None = None
) -> list[Pair] | Unit:
    """
    A row of one of `COMPARISONS`.

    Raises:
        BadRow: If a field is missing or of another type, or the row has another format.
    """
    kind = find_comparison(fields)
    if kind is None:
        raise BadRow(f"no known comparison has the fields {', '.join(map(str, fields))}")
    preferred = kind.prefers(fields)
    if preferred == 0:
        return Unit("", reason="answers equally good")
    if kind.answers[0] == kind.answers[1]:
        sides = _both(required(fields, kind.answers[0]), kind.answers[0])
    else:
        sides = [_answer(required(fields, name), name) for name in kind.answers]
    if kind.prompt is None:
        prompt, *sides = extract_messages(sides[0], sides[1])
    else:
        prompt, *sides = _with_turns(_prompt(required(fields, kind.prompt), kind.prompt), sides)
        extra = fields.get("input") if kind.prompt == "instruction" else None
        if isinstance(extra, str) and extra:
            prompt[-1] = user(prompt[-1]["content"] + "\n" + extra)
    if not prompt or not prompt[-1]["content"].strip():
        return Unit("", reason="no prompt")
    if not all(sides):
        return Unit("", reason="empty answer")
    scores = [number_of(fields.get(name), name) for name in kind.scores or ()] or [None, None]
    if preferred < 0:
        sides, scores = sides[::-1], scores[::-1]
    # The verdict, not the scores, is the order.
    return [
        Pair(
            prompt,
            sides[0],
            sides[1],
            scores[0],
            scores[1],
            ranked=True,
            lang=language_of(fields, lang_column),
        )
    ]


def _prompt(value: Any, name: str) -> Messages:
    if isinstance(value, Mapping):
        # WebGPT's question; a Reddit post, or an article, of the summaries.
        for key in ("full_text", "post", "article"):
            if isinstance(value.get(key), str) and value[key]:
                title = value.get("title") if key == "post" else None
                return [user(f"{title}\n\n{value[key]}" if title else value[key])]
        raise BadRow(f"field {name} is {shown(value)}; must have full_text, post or article")
    turns = _turns(value)
    if turns is not None:
        return [user(text_of(turn, name)) for turn in turns]
    return _messages(value, name, user)


def _answer(value: Any, name: str) -> Messages:
    turns = _turns(value)
    if turns is not None:
        return [answered(text_of(turn, name)) for turn in turns]
    return _messages(value, name, answered)


def _messages(value: Any, name: str, said: Callable[[str], dict[str, str]]) -> Messages:
    value = as_messages(value)
    return messages_of(value, name) if isinstance(value, list) else [said(text_of(value, name))]


def _both(value: Any, name: str) -> list[Messages]:
    if not isinstance(value, list) or len(value) != 2:
        raise BadRow(f"field {name} is {shown(value)}; must be a list of two")
    texts = [each.get("text") if isinstance(each, Mapping) else each for each in value]
    return [[answered(text_of(text, f"{name}[{index}]"))] for index, text in enumerate(texts)]


def _turns(value: Any) -> list[Any] | None:
    """The turns of a JSON list of texts, or None."""
    if not isinstance(value, str) or not value.startswith('["'):
        return None
    try:
        turns = json.loads(value)
    except ValueError:
        return None
    return turns if isinstance(turns, list) and turns else None


def _with_turns(prompt: Messages, sides: list[Messages]) -> tuple[Messages, Messages, Messages]:
    """Prompt and answers; of several turns, as long as both answers are the same."""
    if len(prompt) == 1 or len(sides[0]) == len(sides[1]) == 1:
        return prompt, sides[0], sides[1]
    if {len(side) for side in sides} != {len(prompt)}:
        raise BadRow(
            f"there are {len(prompt)} questions, and {len(sides[0])} and {len(sides[1])} answers"
        )
    # Question and answer by turns, for both sides.
    whole = [[turn for pair in zip(prompt, side, strict=True) for turn in pair] for side in sides]
    return extract_messages(whole[0], whole[1])
