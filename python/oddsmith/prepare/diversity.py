"""Diversity of prepared pairs: lengths, words, and repetition."""

import random
import re
from collections import Counter
from typing import Any

import numpy as np

from .curation import content_of
from .pair import Pair

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
# Pairs whose words are counted: a random sample, so that memory does not grow with the data.
SAMPLE = 4000
# Type-token ratios decrease with the length of a text; over windows of equal length they are
# comparable.
WINDOW = 1000

_WORD = re.compile(r"\w+")


class Diversity:
    """
    Collects the figures of [`~Diversity.report`] in bounded memory.

    Args:
        sample (`int`, *optional*): Pairs whose words are kept.
        seed (`int`, *optional*): Seed of the sample.
    """

    def __init__(self, sample: int = SAMPLE, seed: int = 0):
        self._lengths = {side: Counter() for side in ("prompt", "chosen", "rejected")}
        self._sample: list[tuple[str, str]] = []
        self._size, self._random = sample, random.Random(seed)
        self.pairs = 0

    def add(self, pair: Pair) -> None:
        texts = [content_of(side) for side in (pair.prompt, pair.chosen, pair.rejected)]
        for counter, text in zip(self._lengths.values(), texts, strict=True):
            counter[len(text)] += 1
        # Every pair is in the sample with the same probability (Vitter 1985, algorithm R).
        place = self.pairs if self.pairs < self._size else self._random.randrange(self.pairs + 1)
        self.pairs += 1
        if place < self._size:
            self._sample[place : place + 1] = [(texts[0], texts[1])]

    def report(self, distinct: int, near: int) -> dict[str, Any]:
        """Compute the figures.

        Args:
            distinct (`int`): Distinct prompts.
            near (`int`): Of these, near duplicates.

        Returns:
            `dict[str, Any]`: `distinct_prompts`, `near_duplicate_prompts`; `characters`: quantiles
                by side; `prompt_words` and `chosen_words`: of the sample, the type-token ratio in
                windows of 1,000 words (`None` if there are fewer) and the distinct share of one,
                two and three words in a row.
        """
        prompts, chosen = zip(*self._sample, strict=True) if self._sample else ((), ())
        return {
            "distinct_prompts": distinct,
            "near_duplicate_prompts": near,
            "characters": {
                side: quantiles_of_counts(counter) for side, counter in self._lengths.items()
            },
            "sampled_pairs": len(self._sample),
            "prompt_words": word_figures(prompts),
            "chosen_words": word_figures(chosen),
        }


def quantiles_of_counts(counts: Counter) -> dict[str, float]:
    """Quantiles of values with counts, without interpolation."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    numbers = np.array([counts[value] for value in values.tolist()])
    ends, total = np.cumsum(numbers), int(numbers.sum())
    places = [min(int(quantile * total), total - 1) for quantile in QUANTILES]
    found = values[np.searchsorted(ends, places, side="right")].tolist()
    names = ["min" if q == 0 else "max" if q == 1 else f"p{q * 100:g}" for q in QUANTILES]
    figures = dict(zip(names, found, strict=True))
    figures["mean"] = round(float((values * numbers).sum() / total), 1)
    return figures


def word_figures(texts: tuple[str, ...]) -> dict[str, float | None]:
    """Type-token ratio in windows, and distinct-1, -2 and -3 (Li et al. 2016) of some texts."""
    ratios, window = [], []
    grams, totals = [set() for _ in range(3)], [0, 0, 0]
    for text in texts:
        words = _WORD.findall(text.casefold())
        for size in range(3):
            found = list(zip(*(words[offset:] for offset in range(size + 1)), strict=False))
            totals[size] += len(found)
            # Hashes: the words of the sample would take several times the memory.
            grams[size].update(map(hash, found))
        window += words
        while len(window) >= WINDOW:
            ratios.append(len(set(window[:WINDOW])) / WINDOW)
            del window[:WINDOW]
    figures = {
        f"distinct_{size + 1}": round(len(grams[size]) / totals[size], 4) if totals[size] else None
        for size in range(3)
    }
    ratio = round(float(np.mean(ratios)), 4) if ratios else None
    return {"type_token_ratio": ratio, **figures}
