"""Figures of the diversity of pairs, by hand."""

from collections import Counter

import pytest

from oddsmith.prepare.diversity import Diversity, quantiles_of_counts, word_figures
from oddsmith.prepare.pair import Pair


def test_word_figures():
    # distinct-1: a b c of 5 words; distinct-2: ab bc ca of 4 (ab twice); distinct-3: abc bca cab.
    assert word_figures(("A b c, a b",)) == {
        "type_token_ratio": None,
        "distinct_1": 0.6,
        "distinct_2": 0.75,
        "distinct_3": 1.0,
    }
    # Windows of 1,000 words with 2 and 1 of them distinct; the last 500 words are not a window.
    figures = word_figures(("x y " * 500 + "z " * 1500,))
    assert figures["type_token_ratio"] == pytest.approx(0.0015)
    assert word_figures(())["distinct_1"] is None


def test_quantiles_of_counts():
    # 1 2 3 .. 100
    found = quantiles_of_counts(Counter(range(1, 101)))
    assert found == {"min": 1, "p10": 11, "p50": 51, "p90": 91, "p99": 100, "max": 100,
                     "mean": 50.5}  # fmt: skip
    assert quantiles_of_counts(Counter()) == {}


def test_the_sample_is_bounded_and_fair():
    firsts = 0
    for seed in range(400):
        diversity = Diversity(sample=5, seed=seed)
        for index in range(20):
            diversity.add(Pair(f"q{index}", "Here.", "There."))
        assert len(diversity._sample) == 5
        firsts += ("q0", "Here.") in diversity._sample
    assert 60 <= firsts <= 140  # 5 of 20 of 400 are 100; the standard deviation is below 9
    report = diversity.report(20, 3)
    assert report["distinct_prompts"] == 20
    assert report["characters"]["prompt"]["max"] == 3
