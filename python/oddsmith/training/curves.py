"""Plots training curves."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..stage import staged_file

# Panel title and its metric; metrics of evaluations have the prefix "eval_".
PANELS = (
    ("loss", "loss"),
    ("likelihood term (nll)", "nll_loss"),
    ("reward margin", "rewards/margins"),
    ("preference accuracy", "rewards/accuracies"),
)


def read_series(history: Iterable[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Collects one metric of a trainer's `log_history`.

    Args:
        history (`Iterable[Mapping[str, Any]]`): `trainer.state.log_history`.
        metric (`str`): Name of the metric, such as `"loss"` or `"eval_rewards/margins"`.

    Returns:
        `tuple[list[int], list[float]]`: Steps and values, in the order of the log.
    """
    points = [(entry["step"], float(entry[metric])) for entry in history if metric in entry]
    return [step for step, _ in points], [value for _, value in points]


def save_curves(history: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draws loss, likelihood term, reward margin and preference accuracy over the steps.

    Args:
        history (`Iterable[Mapping[str, Any]]`): `trainer.state.log_history`.
        path (`str` or `Path`): File to write; its suffix names the format (`.png`, `.svg`, `.pdf`).
        title (`str`, *optional*, defaults to `""`): Title of the plot.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the history has none of the metrics.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        # Without pyplot, no backend is chosen and no global state is changed.
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the curves need matplotlib, which is not installed: pip install matplotlib"
        ) from error

    history = list(history)
    series = {
        metric: (read_series(history, metric), read_series(history, f"eval_{metric}"))
        for _, metric in PANELS
    }
    if not any(steps for pair in series.values() for steps, _ in pair):
        raise ValueError(
            "history has no ORPO metrics; pass trainer.state.log_history after at least one log"
        )
    figure = Figure(figsize=(9, 6), layout="constrained")
    if title:
        figure.suptitle(title)
    for axes, (name, metric) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        (train_steps, train_values), (eval_steps, eval_values) = series[metric]
        axes.plot(train_steps, train_values, linewidth=1.0, label="training")
        if eval_steps:
            axes.plot(eval_steps, eval_values, marker="o", markersize=3, label="held out")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
        if metric == "rewards/accuracies":
            axes.set_ylim(0.0, 1.02)
        if train_steps or eval_steps:
            axes.legend(fontsize=8)
    path = Path(path)
    with staged_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:] or None)
    return path
