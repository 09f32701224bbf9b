"""Pictures of runs: loss, learning rate, gradient norm and token accuracy over the optimizer steps, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.runtime import UsageError, explain_os_error
from lory.training.monitor import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any colour vision can tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
_STYLES = ("-", "--", "-.", ":")
_TEXT, _FAINT = "#333333", "#dddddd"


@dataclass(frozen=True)
class _Picture:
    """One PNG: the value it shows by its name in log.jsonl, and how."""

    value: str
    title: str
    label: str
    smoothed: bool = True
    percent: bool = False


_PICTURES = {
    "loss.png": _Picture("loss", "Loss", "loss (nats per token)"),
    # a schedule is a curve without noise, and its average would only lag behind it
    "learning_rate.png": _Picture("learning_rate", "Learning rate", "learning rate", smoothed=False),
    "gradient_norm.png": _Picture("grad_norm", "Gradient norm", "gradient norm (L2, before clipping)"),
    "token_accuracy.png": _Picture("token_accuracy", "Token accuracy", "tokens predicted right (%)", percent=True),
}


@dataclass(frozen=True)
class _Curve:
    """The numbers of one run under one name; a gap is NaN."""

    run: str
    steps: list[int]
    values: list[float]
    eval_steps: list[int]
    eval_values: list[float]


def plot_runs(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Draw loss.png, learning_rate.png, gradient_norm.png and token_accuracy.png, with all the runs in each picture.

    Args:
        runs: run folders, each with a log.jsonl; one that is still being written is fine.
        folder: where the pictures go; made if it is missing.

    Returns:
        The files, in that order.

    Raises:
        UsageError: no run was given, or one of them has no line in its log.jsonl.
        LoryError: the folder cannot be written to.
    """
    if not runs:
        raise UsageError("No run was given to plot; give one run folder or more.")
    logs = {name: _read_run(run) for name, run in zip(_name_runs(runs), runs, strict=True)}
    paths = []
    for file_name, picture in _PICTURES.items():
        path = folder / file_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _draw(picture, [_read_curve(name, log, picture.value) for name, log in logs.items()], path)
        except OSError as error:
            raise explain_os_error(error, f"write {path}") from error
        paths.append(path)
    return paths


def smooth(values: Sequence[float | None], weight: float = 0.9) -> list[float]:
    """The exponential moving average, corrected for its start at zero, so that the first value stands for itself.

    A gap (None, NaN or an infinity) is passed over: the average stays what it was, NaN before the first value.

    Args:
        weight: how much of the average a new value leaves, from 0 (no smoothing) to below 1.

    Raises:
        UsageError: the weight is outside of that range.
    """
    if not 0 <= weight < 1:
        raise UsageError(f"The smoothing weight {weight} was given; give one from 0 to below 1, as 0.9.")
    result = []
    total = share = 0.0
    for value in values:
        if value is not None and math.isfinite(value):
            total = weight * total + (1 - weight) * value
            share = weight * share + (1 - weight)
        result.append(total / share if share else math.nan)
    return result


def _name_runs(runs: Sequence[Path]) -> list[str]:
    """Each run's name in the legend: its folder's, with as many of the parents as tell the runs apart."""
    folders = [run.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise UsageError("The same run was given twice; give each run once.")
    depth = 1
    while len(names := ["/".join(folder.parts[-depth:]) for folder in folders]) > len(set(names)):
        depth += 1
    return names


def _read_run(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    if not path.is_file():
        raise UsageError(f"{run} has no log.jsonl; give the folder of a run that `lory train` has made.")
    if not (log := read_log(run)):
        raise UsageError(f"{path} has no line yet; plot the run once it has logged its first step.")
    return log


def _read_curve(run: str, log: Sequence[Mapping[str, Any]], value: str) -> _Curve:
    def get(entry: Mapping[str, Any]) -> float:
        number = entry.get(value)
        return float(number) if isinstance(number, int | float) and math.isfinite(number) else math.nan

    train = [entry for entry in log if "eval" not in entry]
    # an evaluation that lacks the value is no gap in a curve but no point at all
    evals = [(entry["step"], get(entry["eval"])) for entry in log if "eval" in entry]
    evals = [(step, number) for step, number in evals if not math.isnan(number)]
    return _Curve(
        run,
        [entry["step"] for entry in train],
        [get(entry) for entry in train],
        [step for step, _ in evals],
        [number for _, number in evals],
    )


def _draw(picture: _Picture, curves: Sequence[_Curve], path: Path) -> None:
    # the object interface: pyplot would keep the figures and pick a window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8, 4.5), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        _draw_curve(axes, picture, curve, number, alone=len(curves) == 1)
    _dress(axes, picture)
    if all(math.isnan(value) for curve in curves for value in (*curve.values, *curve.eval_values)):
        axes.text(0.5, 0.5, "no value was logged", transform=axes.transAxes, ha="center", color="#777777")
    figure.savefig(path, format="png")


def _draw_curve(axes: Axes, picture: _Picture, curve: _Curve, number: int, alone: bool) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    # a dollar sign would start a formula
    run = curve.run.replace("$", r"\$")
    if picture.smoothed and len(curve.values) > 1:
        label = "training, each log line" if alone else None
        axes.plot(curve.steps, curve.values, color=colour, alpha=0.3, linewidth=0.9, label=label)
        label = "training, smoothed" if alone else run
        axes.plot(curve.steps, smooth(curve.values), color=colour, linewidth=2.2, label=label)
    else:
        label = "training" if alone else run
        # runs often share a schedule: a dashed curve shows the one beneath; and a single point makes no line
        style = "o" if len(curve.values) == 1 else _STYLES[number % len(_STYLES)]
        axes.plot(curve.steps, curve.values, style, color=colour, linewidth=2.2, label=label)
    if curve.eval_values:
        label = "evaluation" if alone else f"{run}, evaluation"
        eval_colour = _COLOURS[1] if alone else colour
        axes.plot(
            curve.eval_steps, curve.eval_values, "o--", color=eval_colour, linewidth=1.2, markersize=5, label=label
        )
    if alone:
        axes.set_title(run, loc="right", fontsize=9, color="#777777")


def _dress(axes: Axes, picture: _Picture) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_title(picture.title, loc="left", fontsize=13, fontweight="bold", color=_TEXT, pad=10)
    axes.set_xlabel("optimizer step", color=_TEXT)
    axes.set_ylabel(picture.label, color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if picture.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=""))
    elif not picture.smoothed:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
    axes.margins(x=0.02)
    axes.legend(frameon=False, fontsize=9, labelcolor=_TEXT)
