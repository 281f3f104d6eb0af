"""Histograms: bars in a terminal, edges of bins, a plot."""

import numpy as np

from oddsmith.inspection.histogram import draw_bars, edges_of, save_histogram


def test_bars():
    lengths = np.array([3] * 8 + [15] * 4 + [29])
    assert draw_bars(lengths, "tokens", 17).splitlines() == [
        "tokens",
        "   0-4  ████████████████████████████████████████ 8",
        "   5-9                                           0",
        "  10-14                                          0",
        "  15-19 ████████████████████                     4  <- 17",
        "  20-24                                          0",
        "  25-29 █████                                    1",
    ]
    assert draw_bars(lengths[:0], "tokens") == "tokens: no rows"
    # A few much longer rows share the last bin.
    far = draw_bars(np.array([3] * 1000 + [10**6]), "tokens").splitlines()
    assert far[-1].split() == ["4+", "▏", "1"]


def test_edges_are_round_and_hold_the_longest():
    rng = np.random.default_rng(3)
    for top in (1, 7, 99, 1000, 123456):
        lengths = rng.integers(0, top, 500)
        edges = edges_of(lengths)
        step = int(edges[1])
        assert str(step).rstrip("0") in ("1", "2", "5")
        assert (np.diff(edges) == step).all() and edges[0] == 0
        assert edges[-1] > np.quantile(lengths, 0.99)
        assert len(edges) <= 15


def test_a_picture(tmp_path):
    path = save_histogram({"a": np.arange(90), "b": np.ones(3)}, tmp_path / "s" / "h.png", "t", 50)
    assert path.read_bytes().startswith(b"\x89PNG")
