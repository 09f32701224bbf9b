"""The pictures of runs, and the smoothing of their curves."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from matplotlib.image import imread

from lory.runtime import UsageError
from lory.training.plots import plot_runs, smooth

NAMES = ["loss.png", "learning_rate.png", "gradient_norm.png", "token_accuracy.png"]


def write_run(run: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def make_lines(count: int = 20) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 3 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "token_accuracy": 1 - 1 / step}
        for step in range(1, count + 1)
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, matplotlib.figure.Figure]:
    """The figures by file name, kept as they are saved."""
    kept: dict[str, matplotlib.figure.Figure] = {}
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, path: Path, **options: Any) -> None:
        kept[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return kept


def read_labels(figure: matplotlib.figure.Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_smoothing_is_a_bias_corrected_average() -> None:
    # (0.9 * 0.1 * 1 + 0.1 * 2) / (1 - 0.9**2) = 0.29 / 0.19
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, 0.29 / 0.19])
    assert smooth([5.0] * 30) == pytest.approx([5.0] * 30)


def test_weight_zero_smooths_nothing() -> None:
    assert smooth([3.0, 1.0, 2.0], weight=0.0) == [3.0, 1.0, 2.0]


def test_a_gap_leaves_the_average_as_it_was() -> None:
    smoothed = smooth([None, 1.0, None, math.nan, math.inf, 2.0])
    assert math.isnan(smoothed[0])
    assert smoothed[1:5] == [1.0] * 4
    assert smoothed[5] == pytest.approx(smooth([1.0, 2.0])[1])


def test_smoothing_nothing_gives_nothing() -> None:
    assert smooth([]) == []


@pytest.mark.parametrize("weight", [-0.1, 1.0])
def test_a_weight_outside_of_its_range_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="from 0 to below 1"):
        smooth([1.0], weight)


def test_four_pictures_of_960_by_540_dots_are_written(tmp_path: Path) -> None:
    paths = plot_runs([write_run(tmp_path / "v0", make_lines())], tmp_path / "new" / "plots")
    assert paths == [tmp_path / "new" / "plots" / name for name in NAMES]
    assert all(imread(path).shape[:2] == (540, 960) for path in paths)


def test_no_window_system_and_no_global_figure_are_involved(tmp_path: Path) -> None:
    plot_runs([write_run(tmp_path / "v0", make_lines())], tmp_path)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_loss_is_shown_raw_smoothed_and_evaluated(
    tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]
) -> None:
    lines = make_lines()
    run = write_run(tmp_path / "v0", [*lines, {"step": 20, "eval": {"loss": 0.5}}])
    plot_runs([run], tmp_path)
    raw, smoothed, evaluation = figures["loss.png"].axes[0].lines
    losses = [line["loss"] for line in lines]
    assert list(raw.get_ydata()) == losses
    assert list(smoothed.get_ydata()) == smooth(losses)
    assert smoothed.get_linewidth() > raw.get_linewidth()
    assert raw.get_alpha() < 0.5
    assert (list(evaluation.get_xdata()), list(evaluation.get_ydata())) == ([20], [0.5])
    assert evaluation.get_marker() == "o"
    # this evaluation has no token accuracy, so the picture has no such curve
    assert len(figures["token_accuracy.png"].axes[0].lines) == 2


def test_every_picture_has_a_title_and_named_axes(tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]) -> None:
    plot_runs([write_run(tmp_path / "v0", make_lines())], tmp_path)
    assert sorted(figures) == sorted(NAMES)
    for figure in figures.values():
        axes = figure.axes[0]
        assert axes.get_title(loc="left")
        assert axes.get_xlabel() == "optimizer step"
        assert axes.get_ylabel()


def test_several_runs_share_a_picture_under_their_names(
    tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]
) -> None:
    runs = [write_run(tmp_path / name, make_lines()) for name in ("v0-cheap$1", "v1_dear$2")]
    plot_runs(runs, tmp_path)
    assert all(read_labels(figure) == [r"v0-cheap\$1", r"v1_dear\$2"] for figure in figures.values())
    assert len({line.get_color() for line in figures["loss.png"].axes[0].lines}) == 2


def test_runs_of_one_name_are_told_apart_by_their_parents(
    tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]
) -> None:
    runs = [write_run(tmp_path / parent / "v0", make_lines()) for parent in ("mine", "yours")]
    plot_runs(runs, tmp_path)
    assert read_labels(figures["loss.png"]) == ["mine/v0", "yours/v0"]


def test_gaps_missing_values_and_a_torn_last_line_are_no_trouble(tmp_path: Path) -> None:
    lines = make_lines()
    lines[3]["loss"] = None
    for line in lines:
        line["grad_norm"] = None
        del line["token_accuracy"]
    run = write_run(tmp_path / "v0", lines)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    assert [path.name for path in plot_runs([run], tmp_path)] == NAMES


@pytest.mark.parametrize("lines", [make_lines(1), [{"step": 0, "eval": {"loss": 2.0}}]])
def test_a_run_of_a_single_line_can_be_plotted(
    tmp_path: Path, figures: dict[str, matplotlib.figure.Figure], lines: list[dict[str, Any]]
) -> None:
    plot_runs([write_run(tmp_path / "v0", lines)], tmp_path)
    points = [line for line in figures["loss.png"].axes[0].lines if len(line.get_xdata())]
    assert [line.get_marker() for line in points] == ["o"]


def test_a_run_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no log\.jsonl"):
        plot_runs([tmp_path], tmp_path)


@pytest.mark.parametrize("text", ["", "\n", '{"step": 1'])
def test_a_run_without_a_line_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UsageError, match="has no line yet"):
        plot_runs([tmp_path], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_no_run_and_the_same_run_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No run"):
        plot_runs([], tmp_path)
    with pytest.raises(UsageError, match="given twice"):
        plot_runs([tmp_path, tmp_path / "."], tmp_path)
