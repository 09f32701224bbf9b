"""Conversations that branch: asking again or rewriting a question begins a new branch, and the old one stays.

A conversation is a tree of turns. What is shown, and sent to the model, is the path from the beginning to one turn, the
`leaf`. Nothing here knows of a page or of a model.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from lory.runtime import UsageError

UNTITLED = "New conversation"
_TITLE_LENGTH = 40


@dataclass(frozen=True)
class Turn:
    """A question or an answer."""

    role: Literal["user", "assistant"]
    text: str
    parent: int | None = None
    """The turn before it, by its place in the conversation's list; always an earlier one."""
    images: tuple[str, ...] = ()
    """Paths of the pictures that come with a question."""
    model: str = ""
    """Which model answered."""
    ending: str = ""
    """How the answer ended: stop, length, repetition, or stopped by the user."""

    @property
    def content(self) -> str | list[dict[str, str]]:
        """What a message has: the text, or where there are pictures a list of these and the text."""
        if not self.images:
            return self.text
        pictures = [{"type": "image", "image": path} for path in self.images]
        return [*pictures, {"type": "text", "text": self.text}]


@dataclass
class Conversation:
    """A tree of turns, and where in it one is."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    system: str = ""
    """The system prompt; empty: none."""
    turns: list[Turn] = field(default_factory=list)
    leaf: int | None = None
    """The last turn that is shown; None at the beginning."""
    used: float = field(default_factory=time.time)
    """When something was last said, in seconds since 1970."""

    @property
    def path(self) -> list[int]:
        """The places of the turns that are shown."""
        path: list[int] = []
        place = self.leaf
        while place is not None:
            path.append(place)
            place = self.turns[place].parent
        return path[::-1]

    @property
    def shown(self) -> list[Turn]:
        """The turns from the beginning to the leaf."""
        return [self.turns[place] for place in self.path]

    @property
    def title(self) -> str:
        """The beginning of the first question."""
        text = " ".join(next((turn.text for turn in self.shown), "").split())
        short = text if len(text) <= _TITLE_LENGTH else text[: _TITLE_LENGTH - 1].rstrip() + "…"
        return short or (UNTITLED if not self.turns else "Pictures")

    @property
    def awaits_answer(self) -> bool:
        """Whether the last turn is a question."""
        return self.leaf is not None and self.turns[self.leaf].role == "user"

    def messages(self) -> list[dict[str, Any]]:
        """What the model is given."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *({"role": turn.role, "content": turn.content} for turn in self.shown)]

    def ask(self, text: str, images: Sequence[str] = ()) -> None:
        """Add a question.

        Raises:
            UsageError: the last question has no answer yet, or this one says nothing.
        """
        if self.awaits_answer:
            raise UsageError("The last question has no answer yet.")
        if not text.strip() and not images:
            raise UsageError("The question is empty.")
        self._add(Turn("user", text, self.leaf, tuple(images)))

    def answer(self, text: str, model: str = "", ending: str = "") -> None:
        """Add the answer to the last question.

        Raises:
            UsageError: there is no question.
        """
        if not self.awaits_answer:
            raise UsageError("There is no question to answer.")
        self._add(Turn("assistant", text, self.leaf, model=model, ending=ending))

    def edit(self, position: int, text: str) -> None:
        """Say a turn, counted from 0 among those shown, in another way, on a new branch that ends with it.

        A question keeps its pictures and waits for an answer then.

        Raises:
            UsageError: there is no such turn, or the text is empty.
        """
        if not 0 <= position < len(self.shown):
            raise UsageError(f"There is no message number {position + 1} to edit.")
        old = self.shown[position]
        if not text.strip() and not old.images:
            raise UsageError("The edited message is empty.")
        model, ending = (old.model, "edited") if old.role == "assistant" else ("", "")
        self._add(Turn(old.role, text, old.parent, old.images, model, ending))

    def regenerate(self, position: int | None = None) -> None:
        """Go back to a question, for another answer on a new branch.

        Args:
            position: of the answer, or of its question, among the turns shown; None: the last.

        Raises:
            UsageError: there is no answer there.
        """
        shown = self.path if position is None else self.path[: position + 1]
        questions = [place for place in shown if self.turns[place].role == "user"]
        if not questions:
            raise UsageError("There is no answer yet that could be given anew.")
        self.leaf = questions[-1]

    def take_back(self) -> Turn:
        """Go to before the last question, and return it; the branch stays.

        Raises:
            UsageError: there is none.
        """
        questions = [place for place in self.path if self.turns[place].role == "user"]
        if not questions:
            raise UsageError("There is no question to take back.")
        question = self.turns[questions[-1]]
        self.leaf = question.parent
        return question

    def cancel(self) -> None:
        """Give up waiting for an answer: a question that never had one goes, and one is where one was before it."""
        if self.leaf is None or not self.awaits_answer:
            return
        place: int | None = self.leaf
        if place == len(self.turns) - 1:
            place = self.turns.pop().parent
        self.leaf = self._newest_below(place)

    def branches(self) -> list[int]:
        """The last turns of all branches, oldest first."""
        parents = {turn.parent for turn in self.turns}
        return [place for place in range(len(self.turns)) if place not in parents]

    def branch(self) -> tuple[int, int]:
        """Which branch is shown, counted from 1, and how many there are; 0 where it is at none's end."""
        ends = self.branches()
        return (ends.index(self.leaf) + 1 if self.leaf in ends else 0), len(ends)

    def go(self, step: int) -> None:
        """Show the branch so many after (or, below 0, before) this one, round the end."""
        if ends := self.branches():
            # where the path ends within the tree, the branches through it count from the newest
            here = ends.index(end) if (end := self._newest_below(self.leaf)) in ends else 0
            self.leaf = ends[(here + step) % len(ends)]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Conversation:
        """The conversation in a value that may come from anywhere.

        Raises:
            UsageError: it is none.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("turns"), list):
            raise UsageError("A stored conversation is broken.")
        turns = [_read_turn(turn, place) for place, turn in enumerate(value["turns"])]
        leaf, used = value.get("leaf"), value.get("used")
        id, system = value.get("id"), value.get("system")
        fits = isinstance(id, str) and isinstance(system, str) and isinstance(used, int | float)
        if not fits or not (leaf is None or _is_place(leaf, len(turns))):
            raise UsageError("A stored conversation is broken.")
        for turn in turns:
            before = None if turn.parent is None else turns[turn.parent].role
            if (turn.role == "assistant") != (before == "user"):
                raise UsageError("In a stored conversation, questions and answers don't take turns.")
        return cls(cast("str", id), cast("str", system), turns, leaf, cast("float", used))

    def _add(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.leaf = len(self.turns) - 1
        self.used = time.time()

    def _newest_below(self, place: int | None) -> int | None:
        """The end of the newest branch that goes through a turn."""
        newest = {turn.parent: child for child, turn in enumerate(self.turns)}
        while place in newest:
            place = newest[place]
        return place


def _is_place(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _read_turn(value: Any, place: int) -> Turn:
    values = value if isinstance(value, Mapping) else {}
    texts = [values.get(name) for name in ("role", "text", "model", "ending")]
    images, parent = values.get("images"), values.get("parent")
    fits = all(isinstance(text, str) for text in texts) and texts[0] in ("user", "assistant")
    fits = fits and isinstance(images, list | tuple) and all(isinstance(path, str) for path in images)
    if not fits or not (parent is None or _is_place(parent, place)):
        raise UsageError("A stored conversation has a broken turn.")
    return Turn(values["role"], values["text"], parent, tuple(values["images"]), values["model"], values["ending"])


@dataclass
class Shelf:
    """The conversations of one person, and the one that is open."""

    conversations: dict[str, Conversation] = field(default_factory=dict)
    current: Conversation = field(default_factory=Conversation)
    """The open one; it is among `conversations` once something was said in it."""

    def listed(self) -> list[Conversation]:
        """The conversations in which something was said, the last used first."""
        return sorted(self.conversations.values(), key=lambda one: one.used, reverse=True)

    def keep(self) -> None:
        """Put the open conversation among the others, if something was said in it."""
        if self.current.turns:
            self.conversations[self.current.id] = self.current

    def begin(self) -> None:
        """Open an empty conversation with the same system prompt."""
        self.current = Conversation(system=self.current.system)

    def open(self, id: str) -> None:
        """Open a conversation.

        Raises:
            UsageError: there is none of this id.
        """
        if id not in self.conversations:
            raise UsageError("This conversation is gone.")
        self.current = self.conversations[id]

    def delete(self) -> str:
        """Forget the open conversation and open an empty one; returns its id."""
        id = self.current.id
        self.conversations.pop(id, None)
        self.begin()
        return id

    def restore(self, values: Sequence[Any]) -> int:
        """Take in stored conversations; returns how many could not be read."""
        broken = 0
        for value in values:
            try:
                conversation = Conversation.from_json(value)
            except UsageError:
                broken += 1
                continue
            self.conversations[conversation.id] = conversation
        return broken
