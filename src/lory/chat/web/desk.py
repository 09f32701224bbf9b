"""What all visitors of a page share: the models, and who is being answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lory.assistant import Assistant
from lory.chat.web.answers import Answer, stream_answer
from lory.chat.web.controls import Control, list_controls
from lory.generate import GenerationOptions
from lory.models.resolve import find_run
from lory.runtime import UsageError

MOST_CHARACTERS = 200_000
"""The longest text that is taken; what is longer than a model's context is refused by the model."""


@dataclass
class Desk:
    """The models by name, the first being the one that is meant where none is chosen, and what else the page shows."""

    assistants: Mapping[str, Assistant]
    queue: Path | None = None
    """The review queue."""
    run: Path | None = None
    """A run, or the folder of runs whose newest is shown."""
    pictures: Path | None = None
    """The folder that pictures are uploaded to; others are neither shown nor opened."""
    _stops: dict[str, threading.Event] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return list(self.assistants)

    @property
    def first(self) -> Assistant:
        """The model that is meant where none is chosen."""
        return self.assistants[self.names[0]]

    @property
    def sees_images(self) -> bool:
        """Whether one of the models takes pictures."""
        return any(assistant.sees_images for assistant in self.assistants.values())

    def keep_pictures_in(self, folder: Path) -> None:
        """Set where pictures are uploaded to."""
        self.pictures = folder
        for assistant in self.assistants.values():
            assistant.image_root = folder

    def has_picture(self, path: str) -> bool:
        """Whether there is such a picture that a visitor has uploaded."""
        if self.pictures is None or not Path(path).is_absolute():
            return False
        # what a browser has kept may name any file
        found = Path(path).resolve()
        return found.is_relative_to(self.pictures.resolve()) and found.is_file()

    def controls(self, name: str = "") -> list[Control]:
        """The decoding options, set to what the model's own are."""
        return list_controls((self.assistants[name] if name else self.first).options)

    def answer(
        self, visitor: str, name: str, messages: Sequence[Mapping[str, Any]], options: GenerationOptions
    ) -> Iterator[Answer]:
        """Yield the answer of the model `name` as it grows; it ends when the visitor asks for it.

        Raises:
            UsageError: there is no such model, or the text is too long.
            LoryError: whatever the model raises.
        """
        if name not in self.assistants:
            raise UsageError(f"There is no model '{name}' here; choose one of {', '.join(self.names)}.")
        if sum(len(str(message["content"])) for message in messages) > MOST_CHARACTERS:
            raise UsageError(f"The conversation is longer than {MOST_CHARACTERS:,} characters; begin a new one.")
        stop = self._stops.setdefault(visitor, threading.Event())
        return stream_answer(self.assistants[name], messages, options, stop.is_set)

    def begin(self, visitor: str) -> None:
        """Note that a visitor is being answered.

        Raises:
            UsageError: the visitor is being answered already.
        """
        if self.is_busy(visitor):
            raise UsageError("An answer is on its way; stop it first.")
        self._stops[visitor] = threading.Event()

    def end(self, visitor: str) -> None:
        """Note that the answer has ended."""
        self._stops.pop(visitor, None)

    def is_busy(self, visitor: str) -> bool:
        """Whether the visitor is being answered."""
        return visitor in self._stops

    @property
    def is_answering(self) -> bool:
        """Whether any visitor is being answered."""
        return bool(self._stops)

    def stop(self, visitor: str) -> None:
        """End the answer that the visitor is being given."""
        if visitor in self._stops:
            self._stops[visitor].set()


def find_trained(model: str, run: Path | None) -> Path | None:
    """The run to be shown: `run`, or MODEL where that is a run or a folder of runs.

    Raises:
        UsageError: `run` is none.
    """
    if run is not None:
        find_run(run)
        return run
    try:
        find_run(Path(model))
    except UsageError:
        return None
    return Path(model)
