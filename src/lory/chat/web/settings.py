"""Which model answers, under which system prompt, and how its answers are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from lory.chat.web.controls import Control, read_controls
from lory.chat.web.desk import Desk
from lory.generate import GenerationOptions

_SHOWN = 7
"""So many options are in sight; the others are one click away."""


class Settings:
    """The components of the settings."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.controls = desk.controls()
        self.model = gr.Dropdown(
            desk.names, value=desk.names[0], label="Model", interactive=len(desk.names) > 1, elem_id="lory-model"
        )
        self.system = gr.Textbox(label="System prompt", lines=2, max_lines=8, placeholder="none", elem_id="lory-system")
        with gr.Accordion("How answers are decoded", open=True):
            self.options = [_make_control(control) for control in self.controls[:_SHOWN]]
            with gr.Accordion("More options", open=False):
                self.options += [_make_control(control) for control in self.controls[_SHOWN:]]
            self.reset = gr.Button("Back to the model's own", size="sm")
        self.components = [self.model, self.system, *self.options]
        self.reset.click(self.own, self.model, self.options, api_visibility="private", show_progress="hidden")

    def own(self, name: str) -> list[Any]:
        """The model's own options."""
        return [control.value for control in self.desk.controls(name)]

    def read(self, values: Sequence[Any]) -> tuple[str, str, GenerationOptions]:
        """The model's name, the system prompt and the options that the components are set to.

        Raises:
            UsageError: an option does not fit.
        """
        name, system, *options = values
        return name, (system or "").strip(), read_controls(self.controls, options)


def _make_control(control: Control) -> Component:
    common: dict[str, Any] = {
        "label": control.label,
        "info": control.info,
        "value": control.value,
        "interactive": True,
        "elem_id": f"lory-{control.name}",
    }
    if control.kind == "check":
        return gr.Checkbox(**common)
    if control.kind == "choice":
        return gr.Dropdown(list(control.choices), **common)
    ends: dict[str, Any] = {"minimum": control.minimum, "maximum": control.maximum, "step": control.step}
    if control.kind == "number":
        return gr.Number(**common, **ends)
    return gr.Slider(**common, **ends)
