"""JSON and JSON lines, read piece by piece: a file is never in memory as a whole, and errors name the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from lory.data.records.formats import recognise
from lory.data.sources.compressed import DataFile
from lory.data.sources.rows import Row
from lory.runtime import UsageError

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
# what the decoder reports at the very end of a text that is cut off in the middle of a name, number or escape
_LONGEST_TOKEN = 16


def read_jsonl(file: DataFile, start: int = 0) -> Iterator[Row]:
    """One object a line; blank lines part nothing."""
    with file.open_text(newline="\n") as lines:
        yield from parse_lines(str(file), lines, start)


def parse_lines(name: str, lines: Iterable[str], start: int = 0) -> Iterator[Row]:
    """The values of JSON lines from number `start` on; the lines before it are not parsed."""
    for number, line in enumerate(lines, 1):
        # with its newline, an error at the end of a line would be one of the next line
        line = line.rstrip()
        if not line:
            continue
        if start:
            start -= 1
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(_explain(name, number, error)) from error
        yield f"{name} line {number}", record


def count_lines(file: DataFile) -> int:
    """How many lines are not blank."""
    with file.open_text(newline="\n") as lines:
        return sum(not line.isspace() for line in lines)


class _IsLines(Exception):
    """What begins as one JSON value is the first of several."""


def read_json(file: DataFile, start: int = 0) -> Iterator[Row]:
    """An array of records, an object with the array under "data", or, whatever the ending says, JSON lines."""
    with file.open_text(newline="\n") as text:
        stream = _Stream(text, str(file))
        try:
            for number, value in enumerate(_read_values(stream, file), 1):
                if number > start:
                    yield f"{file} record {number}", value
            if stream.peek():
                raise stream.error("Extra data")
            return
        except _IsLines:
            pass  # nothing was given yet: read it again from its beginning
    yield from read_jsonl(file, start)


def _read_values(stream: _Stream, file: DataFile) -> Iterator[Any]:
    match stream.peek():
        case "":
            return
        case "[":
            yield from stream.elements()
        case "{":
            yield from _read_object(stream, file)
        case _:
            shown = json.dumps(stream.value())[:40]
            raise UsageError(f"{file} holds the single value {shown}; an array of records is expected.")


def _read_object(stream: _Stream, file: DataFile) -> Iterator[Any]:
    value = stream.value_at_hand()
    if value is None:  # longer than the piece that is held; an array under "data" is read piece by piece
        value = {}
        for key in stream.members():
            if key == "data" and stream.peek() == "[":
                value[key] = ()
                yield from stream.elements()
            else:
                value[key] = stream.value()
        if value.get("data") == ():
            return
    if stream.peek():
        raise _IsLines
    yield from _find_list(value, file)


def _find_list(value: dict[str, Any], file: DataFile) -> list[Any]:
    if isinstance(value.get("data"), list):
        return value["data"]
    try:
        recognise(value)
    except UsageError:
        raise UsageError(
            f"{file} holds one object, neither a record nor a list of records under 'data'; "
            f"the keys found are {', '.join(sorted(value)[:12])}."
        ) from None
    return [value]  # JSON lines of one line


def _explain(name: str, line: int, error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{name} line {line + error.lineno - 1} is not valid JSON: {error.msg} (column {error.colno})."
    return f"{name} line {line} is not usable JSON: {error}."


class _Stream:
    """A JSON text of any length, of which only the piece around the present place is held."""

    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name
        self._text = ""
        self._at = 0
        self._line = 1  # of the text's first character
        self._ended = False
        self._decode = json.JSONDecoder().raw_decode

    def _fill(self) -> None:
        """Read on, as much as is held already: so a long value is tried again only a few times."""
        self._line += self._text.count("\n", 0, self._at)
        rest = self._text[self._at :]
        wanted = max(_CHUNK, len(rest))
        more = self._file.read(wanted)
        self._ended = len(more) < wanted
        self._text, self._at = rest + more, 0

    def peek(self) -> str:
        """The next character that is no space, which is not consumed; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fill()

    def _expect(self, marks: str) -> str:
        mark = self.peek()
        if not mark or mark not in marks:
            raise self.error(f"Expecting '{marks[0]}' delimiter")
        self._at += 1
        return mark

    def value(self) -> Any:
        """The next value, whatever its length."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._ended or not self._is_cut_off(error):
                    raise UsageError(_explain(self._name, self._line, error)) from error
            else:
                # a number may go on in the next piece
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._fill()

    def value_at_hand(self) -> Any:
        """The next value if it ends in the piece that is held; else None, and nothing is consumed."""
        try:
            value, self._at = self._decode(self._text, self._at)
        except (ValueError, RecursionError) as error:
            if self._ended or not self._is_cut_off(error):
                raise UsageError(_explain(self._name, self._line, error)) from error
            return None
        return value

    def _is_cut_off(self, error: ValueError | RecursionError) -> bool:
        """Whether the error may be one of the piece, not of the file."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_TOKEN

    def elements(self) -> Iterator[Any]:
        """The values of the array that begins here."""
        self._expect("[")
        if self.peek() == "]":
            self._at += 1
            return
        mark = ","
        while mark == ",":
            yield self.value()
            mark = self._expect(",]")

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; the caller takes each one's value."""
        self._expect("{")
        mark = ","
        while mark == ",":
            if self.peek() != '"':
                raise self.error("Expecting property name enclosed in double quotes")
            key = self.value()
            self._expect(":")
            yield key
            mark = self._expect(",}")

    def error(self, message: str) -> UsageError:
        """What is wrong with the next character."""
        return UsageError(_explain(self._name, self._line, json.JSONDecodeError(message, self._text, self._at)))
