"""The box to type in: text alone or, where a model sees, text and pictures."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lory.chat.web.conversations import Turn
from lory.chat.web.desk import Desk


def make_box(desk: Desk, elem_id: str) -> gr.Textbox | gr.MultimodalTextbox:
    """An empty box."""
    common: dict[str, Any] = {"show_label": False, "label": "Question", "max_lines": 12, "elem_id": elem_id}
    common |= {"placeholder": "Enter sends, Shift+Enter begins a line", "submit_btn": True, "autofocus": True}
    if desk.sees_images:
        return gr.MultimodalTextbox(file_types=["image"], file_count="multiple", sources=["upload"], **common)
    return gr.Textbox(lines=1, **common)


def read_box(typed: Any) -> tuple[str, list[str]]:
    """The text in a box, and the paths of the pictures."""
    if isinstance(typed, dict):
        return str(typed.get("text") or ""), [str(path) for path in typed.get("files") or []]
    return str(typed or ""), []


def empty_box(desk: Desk, working: bool = False) -> gr.Textbox | gr.MultimodalTextbox:
    """The change that empties a box.

    Args:
        working: there is an answer on its way, which the box's button stops.
    """
    value: Any = {"text": "", "files": []} if desk.sees_images else ""
    return _kind(desk)(value=value, submit_btn=not working, stop_btn=working)


def rest_box(desk: Desk, typed: Any = None) -> gr.Textbox | gr.MultimodalTextbox:
    """The change after an answer: the button sends again, and what was `typed`, if anything, is back."""
    value = {} if typed is None else {"value": typed}
    return _kind(desk)(submit_btn=True, stop_btn=False, **value)


def write_box(desk: Desk, question: Turn) -> Any:
    """What the box held when a question was sent; pictures that are gone are left out."""
    if not desk.sees_images:
        return question.text
    return {"text": question.text, "files": [path for path in question.images if desk.has_picture(path)]}


def _kind(desk: Desk) -> Any:
    return gr.MultimodalTextbox if desk.sees_images else gr.Textbox
