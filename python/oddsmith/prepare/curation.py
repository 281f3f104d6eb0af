"""Which pairs to keep: the rules of `oddsmith prepare`, and duplicate prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.duplicates import KeyIndex, NearDuplicates, normalise, sketch_texts, split, text_key
from .language import guess_language, may_be
from .pair import Messages, Pair, Unit

# Similarity above which near duplicates are reported if none are dropped.
NEAR = 0.8

# All reasons for dropping a row, in the order of the rules.
REASONS = {
    "bad row": "cannot be read, or a field is missing or of the wrong type",
    "message repeated": "an earlier message has the same message_id",
    "parent missing": "its parent_id does not exist, or is in a circle",
    "tree not ready": "tree_state is not ready_for_export",
    "message deleted": "deleted is true",
    "failed review": "review_result is false",
    "empty message": "has no text",
    "below a dropped message": "replies to a message that was dropped",
    "no prompt": "there is no prompt, or it is empty",
    "no answer at the end": "a dialogue does not end with the assistant",
    "dialogues part earlier": "the dialogues differ before the last answer",
    "fewer than two answers": "has no second answer with a score or rank",
    "no score or rank": "the answer has neither",
    "no rank": "the answer has no rank",
    "answers equally good": "no answer is better than another",
    "no other ranked answer": "no second answer to the same message, or of the same rank",
    "neither best nor worst": "other answers to the same prompt form the pair",
    "no two answers to pair": "not in a conversation with two ranked answers",
    "empty answer": "chosen or rejected is empty",
    "same answers": "chosen and rejected are the same",
    "annotators disagree": "too few judgements prefer the chosen answer",
    "both poor": "chosen is below --min_score",
    "scores too close": "chosen is not better by --min_gap",
    "other language": "not in one of --languages",
    "text among messages": "text if the first pair has messages, or the reverse",
    "duplicate prompt": "an earlier pair has the same prompt",
    "near-duplicate prompt": "the prompt is similar to an earlier one, see --near_duplicates",
}


@dataclass(frozen=True)
class Rules:
    """
    Conditions on pairs.

    Args:
        min_score (`float`, *optional*): Least score of the chosen answer.
        min_gap (`float`, *optional*, defaults to `0.0`): Least difference of the scores. At 0 equal
            scores are dropped too, unless the order comes from ranks.
        keep_ties (`bool`, *optional*): Keep pairs of equal scores.
        min_agreement (`float`, *optional*, defaults to `0.6`): Smallest share of the judgements
            that prefer the chosen answer, ties excluded.
        languages (`frozenset[str]`, *optional*): ISO 639-1 codes; all if empty.
        duplicates (`bool`, *optional*): Keep pairs with repeated prompts.
        near_duplicates (`float`, *optional*): Drop prompts with at least this similarity, 0 to 1.

    Raises:
        ValueError: If a value is out of range.
    """

    min_score: float | None = None
    min_gap: float = 0.0
    keep_ties: bool = False
    min_agreement: float = 0.6
    languages: frozenset[str] = frozenset()
    duplicates: bool = False
    near_duplicates: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_gap) and self.min_gap >= 0):
            raise ValueError(f"min_gap is {self.min_gap}; must be at least 0 and finite")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement is {self.min_agreement}; must be between 0 and 1")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ValueError(f"min_score is {self.min_score}; must be finite")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(
                f"near_duplicates is {self.near_duplicates}; must be above 0 and at most 1"
            )

    def reject(self, pair: Pair) -> str | None:
        """Why to drop a pair, or None; [`Curator`] handles duplicates."""
        answers = [content_of(side).strip() for side in (pair.chosen, pair.rejected)]
        if not all(answers):
            return "empty answer"
        if answers[0] == answers[1]:
            return "same answers"
        if self._disagree(pair):
            return "annotators disagree"
        if self.min_score is not None and pair.score_chosen is not None:
            if pair.score_chosen < self.min_score:
                return "both poor"
        if self._too_close(pair):
            return "scores too close"
        if self.languages and not self._speaks(pair):
            return "other language"
        return None

    def lacks_scores(self, pair: Pair) -> bool:
        """Whether a rule about scores finds none, so that it keeps the pair."""
        if self.min_score is not None and pair.score_chosen is None:
            return True
        return self.min_gap > 0 and None in (pair.score_chosen, pair.score_rejected)

    def _disagree(self, pair: Pair) -> bool:
        if pair.votes is not None and sum(pair.votes):
            return pair.votes[0] < self.min_agreement * sum(pair.votes) - 1e-9
        if pair.score_chosen is None or pair.score_rejected is None or pair.ranked:
            return False
        # The judgement of the better answer, and the scores.
        return pair.score_chosen < pair.score_rejected and self.min_agreement > 0.5

    def _too_close(self, pair: Pair) -> bool:
        if pair.score_chosen is None or pair.score_rejected is None:
            return False
        gap = pair.score_chosen - pair.score_rejected
        if gap == 0 and self.min_gap == 0:
            return not (self.keep_ties or pair.ranked)
        # Scores are decimal fractions: 0.9 - 0.6 is slightly less than 0.3 in floating point.
        return self.min_gap > 0 and gap < self.min_gap - 1e-9

    def _speaks(self, pair: Pair) -> bool:
        if pair.lang is not None:
            return pair.lang in self.languages
        # Only the prompt: it may ask for an answer in another language.
        last = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]
        return may_be(guess_language(last), self.languages)


def content_of(side: str | Messages) -> str:
    """The text of an answer or of a conversation; roles distinguish conversations."""
    if isinstance(side, str):
        return side
    if len(side) == 1:
        return side[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in side)


class Curator:
    """
    Decides about pairs in their order.

    Args:
        rules ([`Rules`]): Conditions on pairs.
        folder (`Path`, *optional*): Folder of the temporary files.

    Attributes:
        distinct (`int`): Different prompts among the kept pairs.
        near (`int`): Of these, those similar to an earlier one.
        judged (`int`): Pairs.
        unscored (`int`): Pairs without the scores that `min_score` or `min_gap` compares.
    """

    def __init__(self, rules: Rules, folder: Path | None = None):
        self.rules = rules
        self.distinct = self.near = self.judged = self.unscored = 0
        self._exact = KeyIndex(folder)
        self._similar = NearDuplicates(rules.near_duplicates or NEAR, folder)
        self._form: type | None = None

    def judge(self, units: Sequence[Unit]) -> list[list[str | None]]:
        """
        For each pair of each unit, the reason to drop it, or None to keep it.

        The pairs of one unit can share a prompt, or the beginning of a conversation, and are not
        duplicates of each other.
        """
        outcomes = [[self.rules.reject(pair) for pair in unit.pairs] for unit in units]
        for unit in units:
            self.judged += len(unit.pairs)
            self.unscored += sum(map(self.rules.lacks_scores, unit.pairs))
        prompts = [
            [
                normalise(content_of(pair.prompt)) if reason is None else ""
                for pair, reason in zip(unit.pairs, reasons, strict=True)
            ]
            for unit, reasons in zip(units, outcomes, strict=True)
        ]
        flat = [text for texts in prompts for text in texts if text]
        unique = list(dict.fromkeys(flat))
        keys = dict(zip(unique, map(text_key, unique), strict=True))
        known = self._exact.find(np.array([keys[text] for text in unique], np.uint64))
        before = {text for text, number in zip(unique, known.tolist(), strict=True) if number >= 0}
        fresh = [text for text in unique if text not in before]
        # First look up all prompts among earlier batches at once, then among new ones.
        sketches = sketch_texts(fresh)
        near = self._similar.find(sketches) >= 0
        self._first = self._similar.count
        parts = dict(zip(fresh, zip(near.tolist(), *split(sketches), strict=True), strict=True))
        for unit, reasons, texts in zip(units, outcomes, prompts, strict=True):
            self._judge_unit(unit, reasons, texts, keys, before, parts)
        self._exact.settle()
        self._similar.settle()
        return outcomes

    def _judge_unit(
        self,
        unit: Unit,
        reasons: list[str | None],
        texts: list[str],
        keys: dict[str, int],
        before: set[str],
        parts: dict[str, tuple[bool, np.ndarray, np.ndarray]],
    ) -> None:
        new: dict[str, bool] = {}  # and whether it is similar to an earlier one
        for index, (pair, text) in enumerate(zip(unit.pairs, texts, strict=True)):
            if reasons[index] is not None:
                continue
            self._form = self._form or type(pair.chosen)
            if type(pair.chosen) is not self._form:
                reasons[index] = "text among messages"
                continue
            if text not in new:
                if text in before or self._exact.find_recent(keys[text]) >= 0:
                    if not self.rules.duplicates:
                        reasons[index] = "duplicate prompt"
                    continue
                near, bands, prints = parts[text]
                new[text] = near or self._similar.find_recent(bands, prints, self._first) >= 0
            if new[text] and self.rules.near_duplicates is not None:
                reasons[index] = "near-duplicate prompt"
        for text, near in new.items():
            if near and self.rules.near_duplicates is not None:
                continue
            self.distinct += 1
            self.near += near
            self._exact.add(keys[text], self.distinct)
            if not near:
                _, bands, prints = parts[text]
                self._similar.add(bands, prints)

    def close(self) -> None:
        """Remove the temporary files."""
        self._similar.close()
