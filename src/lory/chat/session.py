"""One conversation with an assistant: what was said, and how the next answer is decoded. It prints nothing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, cast

from lory.chat.pictures import Picture, mark_pictures
from lory.config import apply_overrides, build
from lory.generate import Ending, GenerationOptions
from lory.runtime import UsageError
from lory.types import Media, Message

if TYPE_CHECKING:
    from lory.assistant import Assistant


class Session:
    """A conversation that a terminal, a web page or a server shows; one thread at a time.

    Args:
        system: the system prompt. None leaves it to the chat template, some of which then put in one of their own;
            an empty text is a system prompt that says nothing.
        options: how answers are decoded, and what `reset_options` goes back to; None takes the assistant's own.
    """

    def __init__(
        self, assistant: Assistant, system: str | None = None, options: GenerationOptions | None = None
    ) -> None:
        self.assistant = assistant
        self.system = system
        self.history: list[dict[str, Any]] = []
        """The user's and the assistant's messages in turn; always whole exchanges. The key `images` has the pictures
        of a question, which stand at the marks <image> of its `content`."""
        self.ending = Ending()
        """How the last answer ended."""
        self._first_options = options or assistant.options
        self.options = self._first_options

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the chat template is given: the system prompt, if there is one, and the history."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *map(_to_message, self.history)]

    @property
    def seed(self) -> int | None:
        """The seed of every answer; None draws each anew. It is one of the options."""
        return self.options.seed

    @property
    def sees_images(self) -> bool:
        """Whether the assistant takes pictures."""
        return bool(getattr(self.assistant, "sees_images", False))

    def ask(self, text: str, pictures: Sequence[Picture] = ()) -> Generator[str, None, None]:
        """The answer piece by piece; question and answer join the history when it is complete.

        An answer that is stopped early (the iterator is closed, or Ctrl-C falls into it) is kept as far as it was
        said, and leaves no trace if nothing was. One that fails leaves no trace either.

        Args:
            pictures: each stands at its mark ``<image>`` in the text; without any mark, they stand before it.

        Raises:
            LoryError: whatever the assistant raises, or as many pictures as there are no marks for.
        """
        question: dict[str, Any] = {"role": "user", "content": mark_pictures(text, pictures)}
        if pictures:
            question["images"] = tuple(pictures)
        return self._answer(question)

    def _answer(self, question: dict[str, Any]) -> Generator[str, None, None]:
        answer = ""
        messages = [*self.messages, _to_message(question)]
        # the assistant promises an iterator; that it can be closed is what stops its generation at once
        self.ending = Ending()
        stream = cast("Generator[str, None, None]", self.assistant.stream(messages, self.options, self.ending))
        with contextlib.closing(stream):
            try:
                for piece in stream:
                    answer += piece
                    yield piece
            except (GeneratorExit, KeyboardInterrupt):
                if answer:
                    self._remember(question, answer)
                raise
        self._remember(question, answer)

    def regenerate(self) -> Generator[str, None, None]:
        """Another answer to the last question, which takes the place of the one before.

        The one before stays if nothing was said in its stead.

        Raises:
            LoryError: nothing was asked yet, or whatever the assistant raises.
        """
        if not self.history:
            raise UsageError("Nothing was asked yet, so there is no answer to make anew.")
        return self._answer_anew()

    def _answer_anew(self) -> Generator[str, None, None]:
        question, answer = self.history[-2:]
        del self.history[-2:]
        left = len(self.history)
        try:
            yield from self._answer(question)
        finally:
            if len(self.history) == left:
                self.history += [question, answer]

    def clear(self) -> None:
        """Forget what was said; the system prompt and the options stay."""
        self.history.clear()

    def set_options(self, text: str) -> None:
        """Set options from `key=value ...`, all of them or, if one is wrong, none.

        Raises:
            UsageError: an unknown key (with the nearest known one) or a value that does not fit.
        """
        settings = re.sub(r"\s*=\s*", "=", text).split()
        for setting in settings:
            if not re.match(r"\w+=", setting):
                raise UsageError(f"'{setting}' was given; an option is set as key=value, as in temperature=0.7.")
        self._change(apply_overrides(self.options.model_dump(), settings))

    def set_seed(self, seed: int | None) -> None:
        """Draw every answer from this seed; None draws each anew."""
        self._change({**self.options.model_dump(), "seed": seed})

    def reset_options(self) -> None:
        """Go back to the options, the seed among them, that the session began with."""
        self.options = self._first_options

    def _remember(self, question: dict[str, Any], answer: str) -> None:
        self.history += [question, {"role": "assistant", "content": answer}]

    def _change(self, values: dict[str, Any]) -> None:
        self.options = build(GenerationOptions, values, "options")


def _to_message(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of the history as the assistant takes it: pictures in their places."""
    if not turn.get("images"):
        return turn
    media = tuple(Media("image", picture.data) for picture in turn["images"])
    return Message(turn["role"], turn["content"], media).to_dict()
