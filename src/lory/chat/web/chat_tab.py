"""The conversation: a box to type in, answers as they grow, and what one may do with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lory.chat.review import ReviewItem, enqueue
from lory.chat.web.answers import Answer, measure_answer
from lory.chat.web.box import empty_box, make_box, read_box, rest_box, write_box
from lory.chat.web.conversations import Conversation, Shelf, Turn
from lory.chat.web.desk import Desk
from lory.chat.web.markup import from_markdown, show_badge, to_markdown
from lory.chat.web.settings import Settings
from lory.runtime import LoryError

Update = dict[Any, Any]
"""New values by component."""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


class ChatTab:
    """The components of the conversation, and what their events do."""

    def __init__(self, desk: Desk, settings: Settings, conversations: gr.Radio, shelf: gr.State) -> None:
        self.desk, self.settings, self.conversations, self.shelf = desk, settings, conversations, shelf
        self.chatbot = gr.Chatbot(
            label="Conversation",
            show_label=False,
            editable="user",
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            height="62vh",
            elem_id="lory-chat",
            placeholder=f"### {', '.join(desk.names[:1])}\nAsk something.",
        )
        self.badge = gr.HTML(elem_id="lory-badge")
        self.box = make_box(desk, "lory-box")
        with gr.Row(elem_classes="lory-actions"):
            self.again = gr.Button("Regenerate", size="sm", interactive=False)
            self.back = gr.Button("‹", size="sm", min_width=40, elem_id="lory-back", visible=False)
            self.place = gr.HTML(elem_id="lory-place", visible=False)
            self.forward = gr.Button("›", size="sm", min_width=40, elem_id="lory-forward", visible=False)
            self.review = gr.Button("To the review queue", size="sm", visible=desk.queue is not None)
        # what the browser is to keep; it is in the page, unseen, since scripts read it there
        self.saved = gr.Textbox(visible="hidden", elem_id="lory-saved")
        self.outputs = [
            self.shelf,
            self.chatbot,
            self.badge,
            self.box,
            self.again,
            self.back,
            self.place,
            self.forward,
            self.review,
            self.conversations,
            self.saved,
            settings.system,
        ]

    def wire(self, new: gr.Button, delete: gr.Button) -> None:
        """Bind the events."""
        asked = [self.shelf, *self.settings.components]
        streaming: dict[str, Any] = {"outputs": self.outputs, "api_visibility": "private", "show_progress": "minimal"}
        streaming |= ONE_AT_A_TIME | {"show_progress_on": self.chatbot}
        quick: dict[str, Any] = {"outputs": self.outputs, "api_visibility": "private", "show_progress": "hidden"}
        self.box.submit(self.ask, [self.box, *asked], **streaming)
        self.again.click(self.regenerate, asked, **streaming)
        self.chatbot.retry(self.regenerate, asked, **streaming)
        self.chatbot.edit(self.edit, asked, **streaming)
        self.box.stop(self.stop, None, None, queue=False, api_visibility="private")
        self.chatbot.undo(self.take_back, self.shelf, **quick)
        self.chatbot.clear(self.delete, self.shelf, **quick)
        self.back.click(self.go_back, self.shelf, **quick)
        self.forward.click(self.go_forward, self.shelf, **quick)
        new.click(self.begin, self.shelf, **quick)
        delete.click(self.delete, self.shelf, **quick)
        self.conversations.input(self.open, [self.shelf, self.conversations], **quick)
        self.review.click(self.to_review, [self.shelf, self.settings.model], None, api_visibility="private")

    def ask(self, typed: Any, shelf: Shelf, request: gr.Request, *values: Any) -> Iterator[Update]:
        """Answer what was typed."""
        text, images = read_box(typed)
        yield from self._answer(shelf, values, request, lambda: shelf.current.ask(text, images), typed)

    def regenerate(self, shelf: Shelf, request: gr.Request, *values: Any) -> Iterator[Update]:
        """Answer the last question anew."""
        yield from self._answer(shelf, values, request, shelf.current.regenerate)

    def edit(self, shelf: Shelf, event: gr.EditData, request: gr.Request, *values: Any) -> Iterator[Update]:
        """Answer a question that was rewritten."""
        position = event.index[0] if isinstance(event.index, list | tuple) else event.index
        text = from_markdown(_text_of(event.value))
        yield from self._answer(shelf, values, request, lambda: shelf.current.edit(position, text))

    def _answer(
        self, shelf: Shelf, values: Sequence[Any], request: gr.Request, begin: Callable[[], None], typed: Any = None
    ) -> Iterator[Update]:
        """Do what `begin` does to the open conversation, and answer its last question.

        Args:
            typed: what goes back into the box if that fails.
        """
        visitor = str(request.session_hash)
        conversation, latest = shelf.current, Answer()
        try:
            self.desk.begin(visitor)
        except LoryError as error:
            gr.Warning(str(error))
            yield {self.shelf: shelf}
            return
        try:
            name, system, options = self.settings.read(values)
            conversation.system = system
            begin()
            yield self._show(shelf) | self._work()
            for latest in self.desk.answer(visitor, name, conversation.messages(), options):
                partial = Turn("assistant", latest.text)
                yield {
                    self.chatbot: show_turns(self.desk, [*conversation.shown, partial]),
                    self.badge: show_badge(latest, name),
                }
            conversation.answer(latest.text, name, latest.ending)
            shelf.keep()
            yield self._show(shelf) | {self.badge: show_badge(latest, name), self.saved: _to_save(conversation)}
        except LoryError as error:
            conversation.cancel()
            gr.Warning(str(error), duration=20)
            yield self._show(shelf) | {self.box: rest_box(self.desk, typed)}
        finally:
            # a visitor who has gone leaves no question without an answer
            conversation.cancel()
            self.desk.end(visitor)

    def stop(self, request: gr.Request) -> None:
        """End the answer; what was said stays."""
        self.desk.stop(str(request.session_hash))

    def take_back(self, shelf: Shelf, request: gr.Request) -> Update:
        """Put the last question back into the box."""
        if self._waits(request):
            return self._leave(shelf)
        try:
            question = shelf.current.take_back()
        except LoryError as error:
            gr.Warning(str(error))
            return self._show(shelf)
        back = {self.box: rest_box(self.desk, write_box(self.desk, question))}
        return self._show(shelf) | back | {self.saved: _to_save(shelf.current)}

    def _go(self, shelf: Shelf, step: int, request: gr.Request) -> Update:
        if self._waits(request):
            return self._leave(shelf)
        shelf.current.go(step)
        return self._show(shelf) | {self.saved: _to_save(shelf.current)}

    def go_back(self, shelf: Shelf, request: gr.Request) -> Update:
        """Show the branch before this one."""
        return self._go(shelf, -1, request)

    def go_forward(self, shelf: Shelf, request: gr.Request) -> Update:
        """Show the next branch."""
        return self._go(shelf, 1, request)

    def begin(self, shelf: Shelf, request: gr.Request) -> Update:
        """Open an empty conversation."""
        if self._waits(request):
            return self._leave(shelf)
        shelf.begin()
        return self._show(shelf)

    def delete(self, shelf: Shelf, request: gr.Request) -> Update:
        """Forget the open conversation."""
        if self._waits(request):
            return self._leave(shelf)
        return {self.saved: json.dumps({"id": shelf.delete(), "deleted": True})} | self._show(shelf)

    def open(self, shelf: Shelf, id: str, request: gr.Request) -> Update:
        """Show another conversation."""
        if self._waits(request):
            return self._leave(shelf)
        try:
            shelf.open(id)
        except LoryError as error:
            gr.Warning(str(error))
        return self._show(shelf)

    def restore(self, shelf: Shelf, stored: str) -> Update:
        """Take in what the browser has kept."""
        # what a session begins with is a copy, the id of its conversation included
        shelf.begin()
        broken = shelf.restore([_parse(text) for text in _parse(stored) or []])
        if kept := shelf.listed():
            shelf.open(kept[0].id)
        if broken:
            gr.Warning(f"{broken} of the conversations that this browser keeps could not be read.")
        return self._show(shelf)

    def to_review(self, shelf: Shelf, name: str) -> None:
        """Put the last answer into the review queue."""
        turns = shelf.current.shown
        if self.desk.queue is None or not turns or turns[-1].role != "assistant":
            gr.Warning("There is no answer yet that could be reviewed.")
        elif any(turn.images for turn in turns):
            gr.Warning("An answer about pictures can't be reviewed: the queue keeps texts alone.")
        else:
            answer = measure_answer(self.desk.assistants[name], turns[-1].text)
            model = turns[-1].model or name
            item = ReviewItem(shelf.current.messages()[:-1], answer.text, "chat", answer.scores, model)
            try:
                enqueue(self.desk.queue, item)
            except LoryError as error:
                gr.Warning(str(error), duration=20)
            else:
                gr.Info("The answer is in the review queue.")

    def _waits(self, request: gr.Request) -> bool:
        if busy := self.desk.is_busy(str(request.session_hash)):
            gr.Info("An answer is on its way; stop it first.")
        return busy

    def _leave(self, shelf: Shelf) -> Update:
        """Nothing but the choice as it was."""
        return {self.shelf: shelf, self.conversations: self._list(shelf)}

    def _work(self) -> Update:
        """What looks otherwise while there is an answer on its way."""
        quiet = {button: gr.Button(interactive=False) for button in (self.again, self.back, self.forward, self.review)}
        return {self.box: empty_box(self.desk, working=True), **quiet}

    def _show(self, shelf: Shelf) -> Update:
        """All that shows the open conversation."""
        conversation = shelf.current
        number, count = conversation.branch()
        said = bool(conversation.shown) and not conversation.awaits_answer
        return {
            self.shelf: shelf,
            self.chatbot: show_turns(self.desk, conversation.shown),
            self.badge: self._badge(conversation) if said else "",
            self.box: rest_box(self.desk),
            self.again: gr.Button(interactive=said),
            self.back: gr.Button(visible=count > 1, interactive=True),
            self.place: gr.HTML(f"branch {number or '–'} of {count}", visible=count > 1),
            self.forward: gr.Button(visible=count > 1, interactive=True),
            self.review: gr.Button(interactive=said),
            self.conversations: self._list(shelf),
            self.settings.system: conversation.system,
        }

    def _list(self, shelf: Shelf) -> gr.Radio:
        titles = [(one.title, one.id) for one in shelf.listed()]
        chosen = shelf.current.id if shelf.current.id in shelf.conversations else None
        return gr.Radio(choices=titles, value=chosen, visible=bool(titles))

    def _badge(self, conversation: Conversation) -> str:
        turn = conversation.shown[-1]
        assistant = self.desk.assistants.get(turn.model, self.desk.first)
        return show_badge(measure_answer(assistant, turn.text, ending=turn.ending), turn.model)


def show_turns(desk: Desk, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as the chat component takes them."""
    return [{"role": turn.role, "content": _show_content(desk, turn)} for turn in turns]


def _show_content(desk: Desk, turn: Turn) -> Any:
    text = to_markdown(turn.text)
    if not turn.images:
        # a bubble without a word looks broken
        return text or ("…" if not turn.ending else "*(no word)*")
    there = [path for path in turn.images if desk.has_picture(path)]
    gone = [] if len(there) == len(turn.images) else ["*(a picture that is no longer here)*"]
    return [*({"path": path} for path in there), *gone, *([text] if text else [])]


def _text_of(value: Any) -> str:
    """The text in a message as the chat component gives it back."""
    if isinstance(value, list):
        return "".join(_text_of(part) for part in value)
    return str(value.get("text") or "") if isinstance(value, dict) else str(value or "")


def _to_save(conversation: Conversation) -> str:
    return json.dumps(conversation.to_json(), ensure_ascii=False)


def _parse(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None
