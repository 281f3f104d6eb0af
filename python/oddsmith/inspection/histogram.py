"""Histogram of the lengths of a dataset's sequences, as text or as a plot."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..stage import staged_file

_BAR = 40


def edges_of(lengths: np.ndarray, bins: int = 12) -> np.ndarray:
    """
    Edges of bins of equal, round width for all lengths except the longest 1 %.

    Args:
        lengths (`np.ndarray`): Lengths, integers.
        bins (`int`, *optional*): Approximate number of bins.

    Returns:
        `np.ndarray`: Edges from 0, int64; the last bin has all longer ones.
    """
    top = float(np.quantile(lengths, 0.99)) if len(lengths) else 1.0
    width = max(top / bins, 1.0)
    scale = 10 ** np.floor(np.log10(width))
    width = next(step * scale for step in (1, 2, 5, 10) if step * scale >= width)
    return np.arange(int(np.ceil((top + 1) / width)) + 1, dtype=np.int64) * int(width)


def draw_bars(lengths: np.ndarray, title: str, limit: int | None = None) -> str:
    """
    A histogram in text.

    Args:
        lengths (`np.ndarray`): Lengths, integers.
        title (`str`): Line above the histogram.
        limit (`int`, *optional*): Longest length in training; its bin is marked.

    Returns:
        `str`: One line per bin.
    """
    if not len(lengths):
        return f"{title}: no rows"
    edges = edges_of(lengths)
    places = np.minimum(np.searchsorted(edges, lengths, side="right") - 1, len(edges) - 1)
    counts = np.bincount(places, minlength=len(edges))
    lines, width = [title], len(f"{edges[-1]:,}")
    for index, count in enumerate(counts.tolist()):
        last = index == len(edges) - 1
        if last and not count:
            break
        bar = "█" * round(_BAR * count / counts.max()) or ("▏" if count else "")
        upper = f"-{edges[index + 1] - 1:<{width},}" if not last else "+" + " " * width
        inside = limit is not None and edges[index] <= limit
        inside = inside and (last or limit < edges[index + 1])
        mark = f"  <- {limit}" if inside else ""
        lines.append(f"  {edges[index]:>{width},}{upper} {bar:<{_BAR}} {count:,}{mark}".rstrip())
    return "\n".join(lines)


def save_histogram(
    sides: Mapping[str, np.ndarray], path: str | Path, title: str = "", limit: int | None = None
) -> Path:
    """
    A histogram as a plot.

    Args:
        sides (`Mapping[str, np.ndarray]`): Lengths by name.
        path (`str` or `Path`): File to write; its suffix names the format (`.png`, `.svg`, `.pdf`).
        title (`str`, *optional*): Title.
        limit (`int`, *optional*): Longest length in training, drawn as a line.

    Returns:
        `Path`: The file.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the suffix is not a known format.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the histogram needs matplotlib, which is not installed: pip install matplotlib"
        ) from error

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = edges_of(np.concatenate(list(sides.values())), bins=50)
    for name, lengths in sides.items():
        # The longest 1 % are in the last bin, so that they do not flatten the rest.
        axes.hist(
            np.minimum(lengths, edges[-1]),
            bins=edges.tolist(),
            histtype="step",
            linewidth=1.4,
            label=name,
        )
    if limit is not None and limit <= edges[-1]:
        axes.axvline(limit, color="gray", linestyle=":", label=f"max_length {limit}")
    axes.set_xlabel("tokens", fontsize=9)
    axes.set_ylabel("rows", fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path = Path(path)
    with staged_file(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:] or None)
    return path
