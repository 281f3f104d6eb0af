"""Formats whose rows are already pairs: chosen and rejected, and the dialogues of HH-RLHF."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..data.chat import extract_prompt
from ..data.layouts import SYSTEMS, Layout, as_messages, find_layout, mapped_layout
from .pair import (
    BadRow,
    Messages,
    Pair,
    Unit,
    assistant,
    number_of,
    required,
    shown,
    text_of,
    text_or_messages,
    user,
)

_TURN = re.compile(r"\n\n(Human|Assistant):")
_LANGUAGES = ("lang", "language")
# Names of the scores of both answers.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_reward", "rejected_reward"),
    ("chosen_rm_score", "rejected_rm_score"),
    ("pm_score_j", "pm_score_k"),
)


def language_of(fields: Mapping[str, Any], column: str | None = None) -> str | None:
    """The language given in a row: `"pt-BR"` and `"pt_BR"` are `"pt"`."""
    for name in (column,) if column else _LANGUAGES:
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            return re.split("[-_]", value.strip().lower())[0]
    return None


def pair_layout(fields: Mapping[str, Any], prompt_column: str = "prompt") -> Layout:
    """
    The columns of a row with two answers; a system message belongs to the prompt.

    Args:
        fields (`Mapping[str, Any]`): The row.
        prompt_column (`str`, *optional*): The prompt, if the user has named it.

    Raises:
        BadRow: If that column is missing, or several could be the prompt.
    """
    try:
        if prompt_column != "prompt":
            layout = mapped_layout({prompt_column: "prompt"}, fields, "the row")
            system = next((name for name in SYSTEMS if isinstance(fields.get(name), str)), None)
            return replace(layout, system=system)
        return find_layout([fields], what="the row", system=True) or Layout()
    except ValueError as error:
        raise BadRow(str(error)) from error


def parse_pair(
    fields: Mapping[str, Any], lang_column: str | None = None, prompt_column: str = "prompt"
) -> list[Pair] | Unit:
    """
    A row with two answers and usually a prompt, each text or messages, in `chosen`, `rejected` and
    `prompt` or columns of other names; see [`~oddsmith.data.layouts.find_layout`].

    UltraFeedback-binarized has this form: its `chosen` and `rejected` contain the question too,
    which is removed. If the scores are lists, each entry is from one annotator.

    Args:
        fields (`Mapping[str, Any]`): The row.
        lang_column (`str`, *optional*): Column with the language; `lang` or `language` if not given.
        prompt_column (`str`, *optional*): The prompt, if it is another column than `prompt`.

    Raises:
        BadRow: If a field is missing or of another type.
    """
    layout, scores = pair_layout(fields, prompt_column), fields
    for side in (layout.chosen, layout.rejected):
        text_or_messages(as_messages(required(fields, side)), side)
    fields = {**fields, "prompt": None, **layout.row(fields)}
    chosen, rejected = (
        text_or_messages(required(fields, side), side) for side in ("chosen", "rejected")
    )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("chosen and rejected must both be strings or both be lists of messages")
    prompt = fields.get("prompt")
    if prompt is not None:
        prompt = text_or_messages(prompt, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            # The answers of a conversation, without their role.
            chosen, rejected = [assistant(chosen)], [assistant(rejected)]
        elif prompt is None:
            prompt, chosen, rejected = extract_prompt(chosen, rejected)
    elif (isinstance(chosen, list) and isinstance(rejected, list)) and (
        not isinstance(prompt, list) or chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
    ):
        # The conversations include the prompt.
        alone = user(prompt) if isinstance(prompt, str) else None
        prompt, chosen, rejected = extract_messages(chosen, rejected)
        if not prompt and alone is not None and chosen[0]["role"] != "user":
            prompt = [alone]
    if not prompt or not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip():
        return Unit("", reason="no prompt")
    (better, worse), votes = _scores(scores)
    lang = language_of(fields, lang_column)
    return [Pair(prompt, chosen, rejected, better, worse, votes, lang=lang)]


def extract_messages(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The common beginning of two conversations, and the rest of each."""
    cut = 0
    # The last message of each is its answer, even if they are equal.
    for mine, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if mine != other:
            break
        cut += 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _scores(
    fields: Mapping[str, Any],
) -> tuple[tuple[float | None, float | None], tuple[int, int] | None]:
    names = next(
        (each for each in SCORES if any(fields.get(name) is not None for name in each)), SCORES[0]
    )
    lists = []
    for name in names:
        value = fields.get(name)
        values = value if isinstance(value, list) else [value]
        lists.append([number_of(each, name) for each in values])
    votes = None
    if max(map(len, lists)) > 1:
        if len(lists[0]) != len(lists[1]):
            raise BadRow(
                f"{names[0]} has {len(lists[0])} annotators and {names[1]} {len(lists[1])}"
            )
        votes = count_votes(lists[0], lists[1])
    return (mean(lists[0]), mean(lists[1])), votes


def count_votes(better: list[float | None], worse: list[float | None]) -> tuple[int, int]:
    """Annotators who scored the first answer higher, and who scored it lower."""
    both = [(a, b) for a, b in zip(better, worse, strict=True) if a is not None and b is not None]
    return sum(a > b for a, b in both), sum(a < b for a, b in both)


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def is_dialogue(value: Any) -> bool:
    """Whether a text is a dialogue in the format of HH-RLHF."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def parse_dialogue(text: Any, name: str) -> Messages:
    r"""
    Messages of a dialogue `"\n\nHuman: ...\n\nAssistant: ..."`; consecutive turns of one side are
    one message.

    Raises:
        BadRow: If it does not begin with the human.
    """
    text = text_of(text, name)
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human":
        raise BadRow(
            f"field {name} is {shown(text)}; must begin with '\\n\\nHuman:' and have turns of "
            "Human and Assistant"
        )
    messages: Messages = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        turn = (user if speaker == "Human" else assistant)(content.strip())
        if messages and messages[-1]["role"] == turn["role"]:
            messages[-1]["content"] += "\n\n" + turn["content"]
        else:
            messages.append(turn)
    return messages


def parse_hh(fields: Mapping[str, Any], lang_column: str | None = None) -> list[Pair] | Unit:
    """
    A row of HH-RLHF: two dialogues that differ only in the last answer.

    Raises:
        BadRow: If `chosen` or `rejected` is missing or is not a dialogue.
    """
    sides = [parse_dialogue(required(fields, side), side) for side in ("chosen", "rejected")]
    if any(messages[-1]["role"] != "assistant" for messages in sides):
        return Unit("", reason="no answer at the end")
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        # The conversations diverge earlier, so these are not two answers to one prompt.
        return Unit("", reason="dialogues part earlier")
    if not chosen[:-1] or not chosen[-2]["content"]:
        return Unit("", reason="no prompt")
    return [Pair(chosen[:-1], chosen[-1:], rejected[-1:], lang=language_of(fields, lang_column))]
