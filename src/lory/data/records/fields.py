"""Reading the parts of a record, with errors that name the key. A key is a path, such as messages[2].content."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


class Dropped(Exception):
    """The record is well-formed but has nothing to learn from; it is left out and counted under `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Malformed(Exception):
    """What is wrong with a record, without a full stop; `convert` puts the place before it."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the records themselves do not say."""

    media_root: str = ""
    """The folder that paths of images, sounds and videos start from and have to stay in; empty: the working one."""
    question: str = ""
    """What is asked about the image of an `image_text` record."""
    media_first: bool = False
    """Whether the media of a record without any mark stand before its first question; otherwise that is an error."""


def check_text(value: Any, key: str) -> str:
    """The value, if it is text that a tokenizer can encode."""
    if not isinstance(value, str):
        raise Malformed(f"'{key}' is {kind_of(value)}, but text is expected")
    if not is_fit(value):
        position = next(at for at, character in enumerate(value) if not is_fit(character))
        code = ord(value[position])
        what = f"half a surrogate pair (\\u{code:04x})" if code else "a NUL character"
        raise Malformed(f"'{key}' holds {what} at position {position}, which is no text; mend or remove the record")
    return value


def is_fit(text: str) -> bool:
    """Whether a tokenizer can encode the text (no lone surrogates) and no NUL tells of a broken file.

    Every text passes through here; a regular expression takes five times as long.
    """
    if "\0" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space."""
    return not text or text.isspace()


def optional_text(record: Mapping[str, Any], key: str, place: str = "") -> str:
    """The text under `key`; empty where it is missing or null, which tables write where a row has no value."""
    value = record.get(key)
    return "" if value is None else check_text(value, f"{place}{key}")


def check_list(value: Any, key: str, items: str) -> list[Any]:
    """The value, if it is a list; `items` says what of."""
    if not isinstance(value, list):
        raise Malformed(f"'{key}' is {kind_of(value)}, but a list of {items} is expected")
    return value


def check_object(value: Any, key: str) -> Mapping[str, Any]:
    """The value, if it is an object."""
    if not isinstance(value, Mapping):
        raise Malformed(f"'{key}' is {kind_of(value)}, but an object is expected")
    return value


def part(value: Any, key: str, name: str) -> Any:
    """What an object has under `name`; `key` is the path of the object."""
    if name not in check_object(value, key):
        raise Malformed(f"'{key}' has no '{name}'; its keys are {quote_all(value)}")
    return value[name]


def read_label(value: Any, key: str) -> str | None:
    """A class as text, or None where there is none (null, blank, NaN, or the number -1, as unlabelled sets have it).

    A float keeps its point ("3.0"), so that marks on a scale can be told from classes ("3").
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or (value == -1 and isinstance(value, int)) or value != value:
        return None
    if isinstance(value, str):
        return None if is_blank(value) else check_text(value, key)
    if isinstance(value, int | float) and abs(value) != float("inf"):
        return str(value)
    raise Malformed(f"'{key}' is {kind_of(value)}, but one class (a number or text) is expected")


def quote_all(names: Collection[str]) -> str:
    """The names in quotes; of many, the first twelve."""
    shown = [f"'{name}'" for name in names][:12]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


def kind_of(value: Any) -> str:
    """A value's type in the words of JSON, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {str(value)[:40]}"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")
