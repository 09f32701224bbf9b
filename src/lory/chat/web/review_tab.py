"""The review queue: one odd answer after the other, to be accepted, edited or rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from lory.chat.review import Decision, Reviewed, decide, read_queue
from lory.chat.web.markup import show_counts, show_item
from lory.runtime import LoryError

Update = dict[Any, Any]


class ReviewTab:
    """The components of the review, and what their events do."""

    def __init__(self, queue: Path, tab: gr.Tab) -> None:
        self.queue = queue
        self.id, self.skipped = gr.State(""), gr.State(())
        self.counts = gr.Markdown(elem_id="lory-counts")
        self.item = gr.HTML(elem_id="lory-item")
        self.text = gr.Textbox(label="The answer as it should be", lines=6, max_lines=20, elem_id="lory-edited")
        with gr.Row():
            self.accept = gr.Button("Accept", variant="primary", size="md")
            self.edit = gr.Button("Accept as edited", size="md")
            self.reject = gr.Button("Reject", variant="stop", size="md")
            self.skip = gr.Button("Skip", size="md")
        self.outputs = [self.id, self.skipped, self.counts, self.item, self.text]
        self.outputs += [self.accept, self.edit, self.reject, self.skip]
        self._wire(tab)

    def _wire(self, tab: gr.Tab) -> None:
        common: dict[str, Any] = {"outputs": self.outputs, "api_visibility": "private", "show_progress": "hidden"}
        inputs = [self.id, self.skipped, self.text]
        tab.select(self.show, [self.skipped], **common)
        self.accept.click(self.accept_answer, inputs, **common)
        self.edit.click(self.edit_answer, inputs, **common)
        self.reject.click(self.reject_answer, inputs, **common)
        self.skip.click(self.skip_answer, inputs[:2], **common)

    def show(self, skipped: tuple[str, ...]) -> Update:
        """Show the oldest answer that nothing was decided about, those that were skipped last."""
        try:
            reviewed = read_queue(self.queue) if self.queue.exists() else []
        except LoryError as error:
            return self._show_nothing(str(error), [], skipped)
        items = [one.item for one in reviewed if one.decision is None]
        # once all were skipped, they come round again
        fresh = [item for item in items if item.id not in skipped]
        skipped = skipped if fresh else ()
        if not items:
            return self._show_nothing("There is nothing to review.", reviewed, skipped)
        item = (fresh or items)[0]
        buttons = dict.fromkeys([self.accept, self.edit, self.reject, self.skip], gr.Button(interactive=True))
        return {
            self.id: item.id,
            self.skipped: skipped,
            self.counts: show_counts(reviewed),
            self.item: show_item(item),
            self.text: gr.Textbox(item.answer, interactive=True),
            **buttons,
        }

    def accept_answer(self, id: str, skipped: tuple[str, ...], text: str) -> Update:
        """Accept the answer as it is."""
        return self._decide(id, skipped, "accept", text)

    def edit_answer(self, id: str, skipped: tuple[str, ...], text: str) -> Update:
        """Take the edited text in the answer's place."""
        return self._decide(id, skipped, "edit", text)

    def reject_answer(self, id: str, skipped: tuple[str, ...], text: str) -> Update:
        """Reject the answer."""
        return self._decide(id, skipped, "reject", text)

    def skip_answer(self, id: str, skipped: tuple[str, ...]) -> Update:
        """Leave the answer for later."""
        return self.show((*skipped, id))

    def _decide(self, id: str, skipped: tuple[str, ...], decision: Decision, text: str) -> Update:
        try:
            item = next((one for one in read_queue(self.queue) if one.item.id == id), None)
            if item and item.decision is not None:
                gr.Info("Somebody else has decided about this answer meanwhile.")
            elif item and (objection := _object(decision, changed=text != item.item.answer)):
                gr.Warning(objection)
                return {self.id: id}
            else:
                decide(self.queue, id, decision, text if decision == "edit" else "")
        except LoryError as error:
            gr.Warning(str(error), duration=20)
            return {self.id: id}
        return self.show(skipped)

    def _show_nothing(self, words: str, reviewed: list[Reviewed], skipped: tuple[str, ...]) -> Update:
        buttons = dict.fromkeys([self.accept, self.edit, self.reject, self.skip], gr.Button(interactive=False))
        counts = f"{words} {show_counts(reviewed)}." if reviewed else words
        empty = {self.id: "", self.skipped: skipped, self.item: "", self.text: gr.Textbox("", interactive=False)}
        return {self.counts: counts, **empty, **buttons}


def _object(decision: Decision, changed: bool) -> str:
    """Why a decision does not go with the text in the box; empty if it does."""
    if decision == "accept" and changed:
        return "The answer was edited; accept it as edited, or undo the change first."
    if decision == "edit" and not changed:
        return "The answer was not changed; accept it as it is, or edit it first."
    return ""
