"""Histograms of token lengths: counted, in blocks for the terminal, and as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.runtime import explain_os_error

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_BINS = 16
_BLOCKS = " ▏▎▍▌▋▊▉█"
# Okabe and Ito's colours, which people with any colour vision can tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
_TEXT, _FAINT = "#333333", "#dddddd"


@dataclass(frozen=True)
class Histogram:
    """How many lengths are in each of some equally wide bins: ``edges[i] <= length < edges[i + 1]``."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def add(cls, parts: Sequence[Histogram]) -> Histogram:
        """The sum of histograms with the same edges."""
        return cls(parts[0].edges, tuple(map(sum, zip(*(part.counts for part in parts), strict=True))))


def count_lengths(lengths: Array, longest: int) -> Histogram:
    """The histogram of lengths from 0 to `longest` tokens, in about 16 bins whose width is a round number."""
    import numpy as np

    width = next(w for w in _round_numbers() if w * _BINS > longest)
    edges = np.arange(0, longest + width + 1, width)
    counts, _ = np.histogram(lengths, bins=edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def _round_numbers() -> Any:
    scale = 1
    while True:
        yield from (scale, 2 * scale, 4 * scale, 5 * scale, 8 * scale)
        scale *= 10


def draw_blocks(histogram: Histogram, width: int = 40) -> list[str]:
    """The histogram line by line, from the first bin that is not empty to the last."""
    filled = [number for number, count in enumerate(histogram.counts) if count]
    if not filled:
        return []
    shown = range(filled[0], filled[-1] + 1)
    most = max(histogram.counts)
    digits = len(f"{histogram.edges[shown[-1] + 1]:,}")
    lines = []
    for number in shown:
        count = histogram.counts[number]
        # what is there at all is never shown as nothing
        eighths = max(round(8 * width * count / most), 1 if count else 0)
        bar = _BLOCKS[8] * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")
        first, last = histogram.edges[number], histogram.edges[number + 1] - 1
        lines.append(f"{first:>{digits},}-{last:<{digits},} {bar} {count:,}")
    return lines


def draw_picture(histograms: Mapping[str, Histogram], max_tokens: int, path: Path) -> None:
    """Write a PNG in which the histograms of several sources stand on top of each other.

    Raises:
        LoryError: the file cannot be written.
    """
    # the object interface: pyplot would keep the figures and pick a window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8, 4.5), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    below = [0] * max(len(histogram.counts) for histogram in histograms.values())
    for number, (name, histogram) in enumerate(histograms.items()):
        width = histogram.edges[1] - histogram.edges[0]
        colour = _COLOURS[number % len(_COLOURS)]
        # a dollar sign would start a formula
        label = name.replace("$", r"\$")
        left = histogram.edges[:-1]
        axes.bar(left, histogram.counts, 0.92 * width, below, align="edge", color=colour, label=label)
        below = [low + count for low, count in zip(below, histogram.counts, strict=True)]
    axes.axvline(max_tokens, color="#777777", linestyle="--", linewidth=1.2, label=f"max_tokens ({max_tokens:,})")
    _dress(axes)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise explain_os_error(error, f"write {path}") from error


def _dress(axes: Any) -> None:
    axes.set_title("Length of the samples", loc="left", fontsize=13, fontweight="bold", color=_TEXT, pad=10)
    axes.set_xlabel("tokens", color=_TEXT)
    axes.set_ylabel("samples", color=_TEXT)
    axes.grid(color=_FAINT, linewidth=0.7, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=_TEXT)
