"""Formats with several scored or ranked answers per prompt, such as the full UltraFeedback."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.duplicates import text_key
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
from .ready import count_votes, language_of, mean

PAIRINGS = ("best_worst", "best_random", "all")


@dataclass(slots=True)
class Answer:
    """
    One of the answers to a prompt.

    Args:
        text (`str`): The answer.
        order (`float`): Sort key of the answers, higher is better.
        score (`float`, *optional*): Score on a scale, for differences and minimum values.
        marks (`list`, *optional*): Scores of several annotators, or by several aspects.
    """

    text: str
    order: float
    score: float | None = None
    marks: list[float | None] | None = None


@dataclass(frozen=True)
class Columns:
    """
    Names of the columns, and keys of answers that are objects.

    Args:
        prompt (`str`): The prompt: text or messages.
        responses (`str`, *optional*): A list of answers: texts, or objects with `text_key`.
        response (`str`, *optional*): One answer; rows with the same prompt are grouped.
        scores (`str`, *optional*): A list of scores, or of lists with one score per annotator; with
        `response`, a score or a list.
        ranks (`str`, *optional*): Ranks, in the same form; the lowest is the best.
        text_key (`str`, *optional*): Text of an answer that is an object.
        score_key (`str`, *optional*): Score of an answer that is an object.
        rank_key (`str`, *optional*): Rank of an answer that is an object.
        lang (`str`, *optional*): Language.
    """

    prompt: str = "prompt"
    responses: str | None = None
    response: str | None = None
    scores: str | None = None
    ranks: str | None = None
    text_key: str | None = None
    score_key: str | None = None
    rank_key: str | None = None
    lang: str | None = None


def draw_pairs(orders: list[float], pairing: str, seed: str) -> list[tuple[int, int]]:
    """
    Which answers form pairs.

    Args:
        orders (`list[float]`): Sort keys of the answers, higher is better.
        pairing (`str`):
            `"best_worst"`: one pair. `"best_random"`: the best and one of the others, drawn with
            the prompt as the seed, as in UltraFeedback-binarized. `"all"`: every two answers that
            are not equally good.
        seed (`str`): The prompt.

    Returns:
        `list[tuple[int, int]]`: Indices of the better and the worse answer; empty if the drawn
            answers are equally good.
    """
    # A stable sort keeps the file's order of equal answers.
    ordered = sorted(range(len(orders)), key=lambda index: -orders[index])
    if len(ordered) < 2:
        return []
    if pairing == "all":
        drawn = [(a, b) for place, a in enumerate(ordered) for b in ordered[place + 1 :]]
    elif pairing == "best_random":
        drawn = [(ordered[0], random.Random(text_key(seed)).choice(ordered[1:]))]
    else:
        drawn = [(ordered[0], ordered[-1])]
    return [(better, worse) for better, worse in drawn if orders[better] > orders[worse]]


def pair_of(
    prompt: Messages, better: Answer, worse: Answer, lang: str | None, ranked: bool
) -> Pair:
    """The pair of two answers; `ranked` if their order does not come from their scores."""
    votes = None
    if better.marks is not None and worse.marks is not None:
        votes = count_votes(better.marks, worse.marks)
    return Pair(
        prompt,
        [assistant(better.text)],
        [assistant(worse.text)],
        better.score,
        worse.score,
        votes,
        ranked,
        lang,
    )


def make_pairs(
    prompt: str | Messages, answers: list[Answer], pairing: str, lang: str | None, ranked: bool
) -> list[Pair] | Unit:
    """Pairs of the answers to a prompt, or a `Unit` with the reason why there are none."""
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if not last.strip():
        return Unit("", reason="no prompt")
    if len(answers) < 2:
        return Unit("", reason="fewer than two answers")
    if len({len(answer.marks or ()) for answer in answers}) > 1:
        raise BadRow("the answers have different numbers of annotators")
    drawn = draw_pairs([answer.order for answer in answers], pairing, last)
    if not drawn:
        return Unit("", reason="answers equally good")
    messages = [user(prompt)] if isinstance(prompt, str) else prompt
    return [pair_of(messages, answers[a], answers[b], lang, ranked) for a, b in drawn]


def parse_ultrafeedback(fields: Mapping[str, Any], pairing: str) -> list[Pair] | Unit:
    """
    A row of UltraFeedback: `instruction` and `completions`, each with its ratings.

    The score is the mean of the ratings by aspect (`fine-grained_score`, 1 to 5), or
    `overall_score` if a row has none; the aspects count as annotators, which can disagree.

    Raises:
        BadRow: If a field is missing or of another type.
    """
    prompt = text_of(required(fields, "instruction"), "instruction")
    completions = required(fields, "completions")
    if not isinstance(completions, list):
        raise BadRow(f"field completions is {shown(completions)}; must be a list")
    answers = []
    for index, completion in enumerate(completions):
        name = f"completions[{index}]"
        if not isinstance(completion, Mapping):
            raise BadRow(f"field {name} is {shown(completion)}; must be an object")
        text = text_of(completion.get("response"), f"{name}.response")
        ratings = _ratings(completion.get("annotations"), name)
        score = number_of(completion.get("fine-grained_score"), f"{name}.fine-grained_score")
        if score is None:
            score = mean(list(ratings.values()))
        if score is None:
            score = number_of(completion.get("overall_score"), f"{name}.overall_score")
        if score is not None:
            answers.append((Answer(text, score, score), ratings))
    aspects = sorted({aspect for _, ratings in answers for aspect in ratings})
    for answer, ratings in answers:
        answer.marks = [ratings.get(aspect) for aspect in aspects] if aspects else None
    return make_pairs(prompt, [a for a, _ in answers], pairing, language_of(fields), ranked=False)


def _ratings(annotations: Any, name: str) -> dict[str, float | None]:
    if not isinstance(annotations, Mapping):
        return {}
    ratings = {}
    for aspect, annotation in annotations.items():
        # One annotation per aspect; some releases put it in a list.
        first = annotation[0] if isinstance(annotation, list) and annotation else annotation
        if isinstance(first, Mapping):
            where = f"{name}.annotations.{aspect}.Rating"
            ratings[aspect] = number_of(first.get("Rating"), where)
    return ratings


def parse_scored(fields: Mapping[str, Any], columns: Columns, pairing: str) -> list[Pair] | Unit:
    """
    A row with a list of answers and their scores or ranks, in the given columns.

    Raises:
        BadRow: If a field is missing or of another type, or the lists differ in length.
    """
    prompt = text_or_messages(required(fields, columns.prompt), columns.prompt)
    if columns.responses is None:
        raise ValueError("columns.responses is None; must name the column of the answers")
    responses = required(fields, columns.responses)
    if not isinstance(responses, list):
        raise BadRow(f"field {columns.responses} is {shown(responses)}; must be a list")
    marks = [_column(fields, name, len(responses)) for name in (columns.scores, columns.ranks)]
    answers = []
    for index, response in enumerate(responses):
        name = f"{columns.responses}[{index}]"
        score, rank = marks[0][index], marks[1][index]
        if isinstance(response, Mapping):
            if columns.text_key is None:
                raise BadRow(f"field {name} is an object; name the key of its text with --text_key")
            score = response.get(columns.score_key) if columns.score_key else score
            rank = response.get(columns.rank_key) if columns.rank_key else rank
            response, name = response.get(columns.text_key), f"{name}.{columns.text_key}"
        answer = make_answer(text_of(response, name), score, rank, name)
        if answer is not None:
            answers.append(answer)
    ranked = columns.ranks is not None or columns.rank_key is not None
    return make_pairs(prompt, answers, pairing, language_of(fields, columns.lang), ranked)


def _column(fields: Mapping[str, Any], name: str | None, count: int) -> list[Any]:
    if name is None:
        return [None] * count
    values = required(fields, name)
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(f"field {name} is {shown(values)}; must be a list of {count}, one per answer")
    return values


def make_answer(text: str, score: Any, rank: Any, name: str) -> Answer | None:
    """An answer with its score, the scores of several annotators, or its rank; None without any."""
    scores = [number_of(each, f"score of {name}") for each in _as_list(score)]
    ranks = [number_of(each, f"rank of {name}") for each in _as_list(rank)]
    mean_score, mean_rank = mean(scores), mean(ranks)
    if mean_rank is not None:
        marks = [None if each is None else -each for each in ranks] if len(ranks) > 1 else None
        return Answer(text, -mean_rank, mean_score, marks)
    if mean_score is None:
        return None
    return Answer(text, mean_score, mean_score, scores if len(scores) > 1 else None)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
