"""Curves: series from a trainer's log, and plots."""

import pytest

from oddsmith.training.curves import PANELS, read_series, save_curves

HISTORY = [
    {"step": 0, "eval_loss": 4.0, "eval_rewards/accuracies": 0.5},
    {"step": 10, "loss": 3.5, "nll_loss": 3.0, "rewards/margins": 0.1, "rewards/accuracies": 0.55},
    # TRL and older transformers log numbers as strings.
    {"step": 20, "loss": "2.5", "nll_loss": 2.25, "rewards/margins": 0.4, "rewards/accuracies": 1},
    {"step": 20, "train_runtime": 3.0, "train_loss": 3.0},
]


def test_series_holds_only_the_entries_with_the_metric():
    assert read_series(HISTORY, "loss") == ([10, 20], [3.5, 2.5])
    assert read_series(HISTORY, "eval_loss") == ([0], [4.0])
    assert read_series(HISTORY, "eval_rewards/margins") == ([], [])


def test_curves_are_a_png_with_a_line_for_each_series(tmp_path):
    pytest.importorskip("matplotlib", reason="the curves need matplotlib")
    path = save_curves(iter(HISTORY), tmp_path / "new" / "curves.png", "a title")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    # Width and height of the header chunk: 9 x 6 inches at 120 dots.
    assert int.from_bytes(content[16:20], "big") == 1080
    assert int.from_bytes(content[20:24], "big") == 720


def test_every_panel_is_drawn_with_its_values(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure", reason="the curves need matplotlib")
    drawn = []

    class Recorder(figure_module.Figure):
        def savefig(self, *args, **kwargs):
            drawn.append(self)
            return super().savefig(*args, **kwargs)

    monkeypatch.setattr(figure_module, "Figure", Recorder)
    save_curves(HISTORY, tmp_path / "curves.svg")
    axes = drawn[0].axes
    assert [each.get_title() for each in axes] == [title for title, _ in PANELS]
    accuracy = axes[3]
    training, held_out = accuracy.lines
    assert list(training.get_ydata()) == [0.55, 1.0]
    assert list(held_out.get_xdata()) == [0]
    assert list(held_out.get_ydata()) == [0.5]


def test_a_history_without_metrics_is_refused(tmp_path):
    pytest.importorskip("matplotlib", reason="the curves need matplotlib")
    with pytest.raises(ValueError, match="no ORPO metrics"):
        save_curves([{"step": 1, "train_runtime": 2.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
