"""A run while it trains: how far it is, its curves and its sample chats, read from its folder every few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from lory.chat.web.markup import show_chats, show_status
from lory.chat.web.progress import VALUES, Point, read_run
from lory.runtime import LoryError

Update = dict[Any, Any]

SECONDS = 2.0
"""Between two looks at the run."""
_TITLES = {
    "loss": "Loss (nats per token)",
    "token_accuracy": "Tokens predicted right",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
}
_SMOOTHED = ("loss", "token_accuracy", "grad_norm")
# Okabe and Ito's colours, which people with any colour vision can tell apart, on light and on dark
_COLOURS = {"training": "#56B4E9", "smoothed": "#0072B2", "evaluation": "#D55E00"}


class RunTab:
    """The components that show a run."""

    def __init__(self, run: Path, tab: gr.Tab, others: Sequence[gr.Tab]) -> None:
        self.run = run
        self.seen = gr.State(None)
        self.status = gr.HTML(elem_id="lory-run")
        self.plots: dict[str, gr.LinePlot] = {}
        for first in (0, 2):
            with gr.Row():
                for value in VALUES[first : first + 2]:
                    self.plots[value] = self._make_plot(value)
        self.chats = gr.HTML(elem_id="lory-samples")
        self.timer = gr.Timer(SECONDS, active=False)
        self.outputs = [self.seen, self.status, *self.plots.values(), self.chats]
        common: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.timer.tick(self.show, self.seen, self.outputs, **common)
        tab.select(lambda: (gr.Timer(active=True), None), None, [self.timer, self.seen], **common).then(
            self.show, self.seen, self.outputs, **common
        )
        # a page that shows something else takes no time from the training
        for other in others:
            other.select(lambda: gr.Timer(active=False), None, self.timer, **common)

    def _make_plot(self, value: str) -> gr.LinePlot:
        return gr.LinePlot(
            x="step",
            y="value",
            color="series",
            color_map=_COLOURS,
            x_title="optimizer step",
            y_title=" ",
            color_title=" ",
            title=_TITLES[value],
            height=260,
            x_axis_format="d",
            y_axis_format=".1e" if value == "learning_rate" else ".3~g",
            visible=False,
            buttons=["fullscreen"],
            elem_id=f"lory-plot-{value}",
        )

    def show(self, seen: Any) -> Update:
        """What has changed since `seen`."""
        try:
            state = read_run(self.run)
        except LoryError as error:
            return {self.status: show_status(None, str(error))}
        now = (str(state.folder), len(state.log), len(state.samples))
        update: Update = {self.seen: now, self.status: show_status(state)}
        if seen is not None and tuple(seen) == now:
            return update
        for value, plot in self.plots.items():
            points = state.points(value)
            # without a point, the plot would draw its axes from infinity to infinity
            update[plot] = gr.LinePlot(make_table(points, value in _SMOOTHED), visible=bool(points))
        return update | {self.chats: show_chats(state.chats())}


def make_table(points: Sequence[Point], smoothed: bool) -> pd.DataFrame:
    """The curves of a value as a table of step, value and series.

    Args:
        smoothed: with the moving average of the training's curve (the weight of the old is 0.9, as in ``lory plot``).
    """
    table = pd.DataFrame(
        {"step": [p.step for p in points], "value": [p.value for p in points], "series": [p.series for p in points]}
    )
    training = table[table["series"] == "training"]
    if not smoothed or len(training) < 2:
        return table
    average = training.assign(value=training["value"].ewm(alpha=0.1).mean(), series="smoothed")
    return pd.concat([table, average], ignore_index=True)
