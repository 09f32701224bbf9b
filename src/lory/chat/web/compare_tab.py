"""Two models side by side: the same question to both, such as before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lory.chat.variants import BASE
from lory.chat.web.answers import Answer, stream_side_by_side
from lory.chat.web.box import empty_box, make_box, read_box, rest_box
from lory.chat.web.chat_tab import ONE_AT_A_TIME, Update, show_turns
from lory.chat.web.conversations import Conversation, Turn
from lory.chat.web.desk import Desk
from lory.chat.web.markup import show_badge
from lory.chat.web.settings import Settings
from lory.runtime import LoryError

Pair = tuple[Conversation, Conversation]


class CompareTab:
    """The components of the comparison, and what their events do."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        self.desk, self.settings = desk, settings
        self.pair = gr.State((Conversation(), Conversation()))
        self.models: list[gr.Dropdown] = []
        self.chatbots: list[gr.Chatbot] = []
        self.badges: list[gr.HTML] = []
        with gr.Row():
            before = BASE if BASE in desk.names else desk.names[0]
            after = next(name for name in desk.names if name != before)
            for side, name in (("left", before), ("right", after)):
                self._make_side(side, name)
        self.box = make_box(desk, "lory-compare-box")
        self.clear = gr.Button("Begin anew", size="sm")
        self._wire()

    def _make_side(self, side: str, name: str) -> None:
        with gr.Column(min_width=280):
            self.models.append(gr.Dropdown(self.desk.names, value=name, label=f"Model on the {side}"))
            self.chatbots.append(
                gr.Chatbot(
                    label=f"Answers on the {side}",
                    show_label=False,
                    buttons=["copy"],
                    feedback_options=None,
                    allow_tags=False,
                    height="50vh",
                    elem_id=f"lory-{side}",
                    placeholder=f"Answers on the {side}",
                )
            )
            self.badges.append(gr.HTML())

    def _wire(self) -> None:
        outputs = [self.pair, *self.chatbots, *self.badges, self.box]
        common: dict[str, Any] = {"outputs": outputs, "api_visibility": "private"}
        self.box.submit(
            self.ask,
            [self.box, self.pair, *self.models, *self.settings.components],
            show_progress="minimal",
            show_progress_on=self.chatbots,
            **common,
            **ONE_AT_A_TIME,
        )
        self.box.stop(self.stop, None, None, queue=False, api_visibility="private")
        for clear in (self.clear.click, *(chatbot.clear for chatbot in self.chatbots)):
            clear(self.begin, self.pair, show_progress="hidden", **common)

    def ask(self, typed: Any, pair: Pair, left: str, right: str, request: gr.Request, *values: Any) -> Iterator[Update]:
        """Answer what was typed, on both sides."""
        visitor, names = str(request.session_hash), (left, right)
        latest = [Answer(), Answer()]
        try:
            self.desk.begin(visitor)
        except LoryError as error:
            gr.Warning(str(error))
            yield {self.pair: pair}
            return
        try:
            _, system, options = self.settings.read(values)
            text, images = read_box(typed)
            for conversation in pair:
                conversation.system = system
                conversation.ask(text, images)
            yield self._show(pair, latest, names) | {self.box: empty_box(self.desk, working=True)}
            asked = zip(names, pair, strict=True)
            streams = [self.desk.answer(visitor, name, one.messages(), options) for name, one in asked]
            for latest in stream_side_by_side(streams):
                yield self._show(pair, latest, names)
            for conversation, answer, name in zip(pair, latest, names, strict=True):
                conversation.answer(answer.text, name, answer.ending)
            yield self._show(pair, latest, names) | {self.box: rest_box(self.desk)}
        except LoryError as error:
            for conversation in pair:
                conversation.cancel()
            gr.Warning(str(error), duration=20)
            yield self._show(pair, [Answer(), Answer()], names) | {self.box: rest_box(self.desk, typed)}
        finally:
            for conversation in pair:
                conversation.cancel()
            self.desk.end(visitor)

    def stop(self, request: gr.Request) -> None:
        """End both answers; what was said stays."""
        self.desk.stop(str(request.session_hash))

    def begin(self, pair: Pair, request: gr.Request) -> Update:
        """Forget what was said on both sides."""
        if self.desk.is_busy(str(request.session_hash)):
            gr.Info("An answer is on its way; stop it first.")
            return {self.pair: pair}
        return self._show((Conversation(), Conversation()), [Answer(), Answer()], ("", ""))

    def _show(self, pair: Pair, answers: list[Answer], names: tuple[str, str]) -> Update:
        update: Update = {self.pair: pair}
        for side, (conversation, answer) in enumerate(zip(pair, answers, strict=True)):
            growing = [Turn("assistant", answer.text)] if conversation.awaits_answer else []
            update[self.chatbots[side]] = show_turns(self.desk, [*conversation.shown, *growing])
            update[self.badges[side]] = show_badge(answer, names[side])
        return update
