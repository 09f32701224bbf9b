"""What a person types, over one line or several: a backslash at the end of a line, or a block in triple quotes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lory.runtime import UsageError

QUOTES = '"""'
_CONTINUED = re.compile(r"(?<!\\)((?:\\\\)*)\\\n")


@dataclass(frozen=True)
class Typed:
    """A question or a command."""

    text: str
    literal: bool = False
    """It is sent as it is, even if it begins with a colon."""


class Lines:
    """Lines that are given one by one, until they make a whole text."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._in_block = False

    @property
    def open(self) -> bool:
        """Whether there are lines that are no whole text yet."""
        return bool(self._lines)

    def add(self, line: str) -> Typed | None:
        """The text that the line completes, if it does."""
        stripped = line.strip()
        if not self._lines and stripped.startswith(QUOTES):
            self._in_block = True
            closed = len(stripped) >= 2 * len(QUOTES) and stripped.endswith(QUOTES)
        else:
            closed = stripped.endswith(QUOTES) if self._in_block else not _is_continued(line)
        self._lines.append(line)
        return self.close() if closed else None

    def close(self) -> Typed:
        """The text so far.

        Raises:
            UsageError: a block was opened and not closed.
        """
        text, self._lines, self._in_block = "\n".join(self._lines), [], False
        return fold(text)


def is_open(text: str) -> bool:
    """Whether more lines belong to what was typed."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return not (len(stripped) >= 2 * len(QUOTES) and stripped.endswith(QUOTES))
    return _is_continued(text)


def fold(text: str) -> Typed:
    """What was meant by what was typed: without quotes around a block, and without backslashes at the ends of lines.

    An even number of backslashes, as at the end of a line of LaTeX, is text.

    Raises:
        UsageError: a block was opened and not closed.
    """
    if is_open(text) and text.strip().startswith(QUOTES):
        raise UsageError(f"A block that begins with {QUOTES} was not closed; end it with {QUOTES}. It was not sent.")
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        inner = stripped[len(QUOTES) : -len(QUOTES)]
        return Typed(inner.removeprefix("\n").removesuffix("\n"), literal=True)
    return Typed(_CONTINUED.sub(r"\1\n", text).strip())


def _is_continued(line: str) -> bool:
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1
