"""Duplicates and near duplicates, compared with their definitions."""

import random

import numpy as np
import pytest

from oddsmith.data.duplicates import (
    BINS,
    KeyIndex,
    NearDuplicates,
    normalise,
    sequence_keys,
    sketch_texts,
    sketch_tokens,
    text_key,
)

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("n", "st", "rk", "")]


def texts_of(count, seed, length=40):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def changed(text, share, rng):
    words = text.split()
    for index in rng.sample(range(len(words)), round(share * len(words))):
        words[index] = rng.choice(WORDS)
    return " ".join(words)


def jaccard(a, b):
    sets = [{(text + "\0" * 5)[i : i + 5] for i in range(len(text))} for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_normalise():
    assert normalise("  What\tIS\n\nthis? ") == "what is this?"
    assert normalise("\ufb01ne \uff21\uff22") == "fine ab"
    assert normalise("2+2") != normalise("2-2")


def test_keys_are_the_same_in_every_process():
    assert text_key("what is this?") == 0xE1799C2B82097201
    assert text_key("a") != text_key("b")


def test_sequence_keys_tell_order_length_and_content_apart():
    rows = [[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3], [], [0], [0, 0], []]
    flat = np.array([value for row in rows for value in row])
    keys = sequence_keys(flat, np.array(list(map(len, rows)))).tolist()
    assert keys[0] == keys[3]
    assert keys[4] == keys[7]
    assert len(set(keys)) == len(rows) - 2


def test_the_sketch_estimates_jaccard_similarity():
    rng = random.Random(4)
    errors = []
    for text in texts_of(150, seed=1):
        other = changed(text, rng.choice([0.05, 0.1, 0.3]), rng)
        sketch = sketch_texts([text, other])
        errors.append(float((sketch[0] == sketch[1]).mean()) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.08
    unlike = sketch_texts(texts_of(2, seed=9))
    assert (unlike[0] == unlike[1]).mean() < 0.4


@pytest.mark.parametrize("text", ["", "a", "ab", "一", "🙂🙂"])
def test_short_texts_have_whole_sketches(text):
    mine, same, other = sketch_texts([text, text, text + "z"])
    assert (mine == same).all()
    assert (mine == other).mean() < 1.0 or text == "z"
    assert mine.shape == (BINS,)


def test_sketches_do_not_depend_on_their_neighbours(monkeypatch):
    texts = texts_of(20, seed=2) + ["", "x"]
    together = sketch_texts(texts)
    alone = np.concatenate([sketch_texts([text]) for text in texts])
    assert (together == alone).all()
    monkeypatch.setattr("oddsmith.data.duplicates._TEXTS", 3)
    assert (sketch_texts(texts) == together).all()
    assert sketch_texts([]).shape == (0, BINS)
    tokens = [[5, 6, 7, 8], [5], [], [5, 6, 7, 8]]
    flat = np.array([token for row in tokens for token in row])
    sketches = sketch_tokens(flat, np.array([4, 1, 0, 4]))
    assert (sketches[0] == sketches[3]).all() and not (sketches[0] == sketches[1]).all()


def test_the_index_agrees_with_a_dictionary(tmp_path):
    rng = np.random.default_rng(5)
    index, truth = KeyIndex(tmp_path, recent=50, run=400), {}
    for batch in range(60):
        keys = rng.integers(0, 1500, 40).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        expected = [truth.get(key, -1) for key in keys.tolist()]
        assert index.find(keys).tolist() == expected
        for place, key in enumerate(keys.tolist()):
            if key not in truth:
                truth[key] = batch * 40 + place
                index.add(key, truth[key])
        index.settle()
    # A part is in files, which are already unlinked.
    assert any(isinstance(known, np.memmap) for known, _ in index._runs)
    assert list(tmp_path.iterdir()) == []
    assert index.find(np.zeros((0,), np.uint64)).shape == (0,)


def test_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(7)
    originals = texts_of(300, seed=8)
    copies = [changed(text, 0.025, rng) for text in originals]
    unlike = [changed(text, 0.6, rng) for text in originals]
    near = NearDuplicates(0.7)
    assert (near.find_and_add(sketch_texts(originals)) == -1).all()
    found = near.find(sketch_texts(copies))
    assert (found == np.arange(300)).mean() > 0.98
    assert (near.find(sketch_texts(unlike)) == -1).all()
    near.close()


def test_near_duplicates_within_one_batch():
    texts = texts_of(3, seed=3)
    near = NearDuplicates(0.9)
    found = near.find_and_add(sketch_texts([texts[0], texts[1], texts[0], texts[2], texts[1]]))
    assert found.tolist() == [-1, -1, 0, -1, 1]
    assert near.count == 3
    near.close()


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_wrong_thresholds(threshold):
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        NearDuplicates(threshold)
