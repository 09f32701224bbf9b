"""Images, sounds and videos in records: what a value may be, and which goes where. Nothing is opened here."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from lory.data.records.fields import Malformed, ReadOptions, check_object, check_text, kind_of, part, quote_all
from lory.types import MEDIA_KINDS, Media, MediaKind, Message

COLUMNS: dict[str, MediaKind] = {
    "images": "image",
    "image": "image",
    "audios": "audio",
    "audio": "audio",
    "videos": "video",
    "video": "video",
}
"""The keys of a record that hold media, for the marks ``<image>``, ``<audio>`` and ``<video>`` in its text."""

MARKS = re.compile(r"<(image|audio|video)>")
LONGEST_PATH = 4096
_DATA_URL = re.compile(r"data:(?:(\w+)/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
# what the types of content parts are called; a kind's own name is one of them
_PART_TYPES: dict[str, MediaKind] = {
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
    "image": "image",
    "audio": "audio",
    "video": "video",
}


def read_media(value: Any, kind: MediaKind, key: str, options: ReadOptions) -> Media:
    """A path, a URL, a data URL, the file's bytes, or ``{"bytes": ..., "path": ..., "url": ...}`` with one of them.

    A path becomes one that starts at the working directory. That it stays inside of `media_root` is checked by its
    spelling alone: who opens it still has to mind symbolic links.
    """
    if isinstance(value, Mapping):
        given = [name for name in ("bytes", "url", "path") if value.get(name) is not None]
        if not given:
            raise Malformed(f"'{key}' has none of 'bytes', 'path' and 'url'; its keys are {quote_all(value)}")
        # beside the bytes, the path is only the file's former name
        return read_media(value[given[0]], kind, f"{key}.{given[0]}", options)
    if isinstance(value, bytes):
        if not value:
            raise Malformed(f"'{key}' is empty, but the bytes of a file are expected")
        return Media(kind, value)
    if not isinstance(value, str):
        raise Malformed(
            f"'{key}' is {kind_of(value)}, but a path, a URL or a file's bytes are expected "
            "(in a data set of decoded media, switch decoding off)"
        )
    if not check_text(value, key).strip():
        raise Malformed(f"'{key}' is empty, but a path or a URL is expected")
    if value[:5].lower() == "data:":
        return Media(kind, _check_data_url(value, kind, key))
    if value[:5].lower() == "file:" or "://" in value:
        return Media(kind, _check_url(value, key))
    return Media(kind, _place_path(value, key, options.media_root))


def _check_data_url(value: str, kind: MediaKind, key: str) -> str:
    start = _DATA_URL.match(value)
    if not start:
        raise Malformed(f"'{key}' begins with '{value[:30]}', but a data URL is data:{kind}/...;base64,...")
    if start[1] not in (None, kind, "application"):
        raise Malformed(f"'{key}' is a data URL of type '{start[1]}', but '{kind}' is expected")
    try:
        content = base64.b64decode(value[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"'{key}' is a data URL whose base64 is broken: {error}") from None
    if not content:
        raise Malformed(f"'{key}' is a data URL without content")
    return value


def _check_url(value: str, key: str) -> str:
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        valid = False
    if not valid:
        raise Malformed(
            f"'{key}' is the URL '{value[:60]}', but http(s)://host/..., a data URL or a path without file: is expected"
        )
    return value


def _place_path(value: str, key: str, root: str) -> str:
    if len(value) > LONGEST_PATH:
        raise Malformed(
            f"'{key}' is text of {len(value)} characters, too long for a path; base64 is written as data:...;base64,..."
        )
    path = os.path.normpath(os.path.join(root, value))
    base = os.path.abspath(root)
    if not os.path.abspath(path).startswith(os.path.join(base, "")):
        raise Malformed(
            f"'{key}' is the path '{value[:60]}', which leads out of the folder {base}; "
            "move the file there, or name a folder above both as the root of the media"
        )
    return path


def has_columns(record: Mapping[str, Any]) -> bool:
    """Whether the record has a key for media, whatever it holds."""
    return not COLUMNS.keys().isdisjoint(record)


def place_columns(record: Mapping[str, Any], messages: Sequence[Message], options: ReadOptions) -> list[Message]:
    """The messages with the media of the record's columns, each in the place of its mark.

    Messages that have media of their own, from content parts, are left as they are.

    Raises:
        Malformed: there are more or fewer marks of a kind than media.
    """
    media = _read_columns(record, options)
    marks = [[] if message.media else MARKS.findall(message.content) for message in messages]
    if options.media_first and not any(marks) and (first := _find_question(messages)) is not None:
        prefix = [kind for kind in MEDIA_KINDS for _ in media[kind]]
        marks[first] = prefix
        content = "".join(f"<{kind}>" for kind in prefix) + messages[first].content
        messages = [*messages[:first], replace(messages[first], content=content), *messages[first + 1 :]]
    for kind in MEDIA_KINDS:
        count, given = sum(found.count(kind) for found in marks), len(media[kind])
        if count != given:
            names = [f"'{name}'" for name in COLUMNS if COLUMNS[name] == kind and name in record]
            raise Malformed(
                f"the text has {count} <{kind}> mark{'s' if count != 1 else ''}, but "
                f"{names[0] if names else 'the record'} has {given}; write <{kind}> once where each belongs"
            )
    queues = {kind: iter(items) for kind, items in media.items()}
    return [
        replace(message, media=tuple(next(queues[kind]) for kind in found)) if found else message
        for message, found in zip(messages, marks, strict=True)
    ]


def _read_columns(record: Mapping[str, Any], options: ReadOptions) -> dict[str, list[Media]]:
    media: dict[str, list[Media]] = {kind: [] for kind in MEDIA_KINDS}
    for name, kind in COLUMNS.items():
        value = record.get(name)
        if value is None:
            continue
        if media[kind]:
            raise Malformed(f"there are both '{name}s' and '{name}'; keep one of them")
        if isinstance(value, list):
            media[kind] = [read_media(item, kind, f"{name}[{at}]", options) for at, item in enumerate(value)]
        else:
            media[kind] = [read_media(value, kind, name, options)]
    return media


def _find_question(messages: Sequence[Message]) -> int | None:
    return next((at for at, message in enumerate(messages) if message.role == "user" and not message.media), None)


def read_parts(parts: Sequence[Any], key: str, in_columns: bool, options: ReadOptions) -> tuple[str, tuple[Media, ...]]:
    """Content that is a list of parts, as text with marks and the media for them.

    Media parts without a value, such as ``{"type": "image"}``, stand for those of the record's columns: their marks
    come without media then.
    """
    texts: list[str] = []
    media: list[Media] = []
    bare = 0
    for number, item in enumerate(parts):
        place = f"{key}[{number}]"
        type_ = check_text(part(item, place, "type"), f"{place}.type")
        if type_ == "text":
            texts.append(check_text(part(item, place, "text"), f"{place}.text"))
        elif type_ not in _PART_TYPES:
            raise Malformed(
                f"'{place}.type' is the unknown type '{type_[:40]}'; known are 'text', {quote_all(_PART_TYPES)}"
            )
        elif (found := _read_media_part(item, type_, place, options)) is not None:
            media.append(found)
            texts.append(f"<{found.kind}>")
        elif in_columns:
            bare += 1
            texts.append(f"<{_PART_TYPES[type_]}>")
        else:
            raise Malformed(f"'{place}' has no '{type_}' in it, nor does the record have {quote_all(COLUMNS)}")
    if media and bare:
        raise Malformed(f"'{key}' has media both with and without a value; write all of them in one way")
    content = "".join(texts)
    if media and len(MARKS.findall(content)) != len(media):
        raise Malformed(f"'{key}' has a mark such as <image> in a text beside its media, which would stand for another")
    return content, tuple(media)


def _read_media_part(item: Mapping[str, Any], type_: str, place: str, options: ReadOptions) -> Media | None:
    """The media of a part: under the type's own name (text, bytes or an object), or under url, path or base64."""
    kind = _PART_TYPES[type_]
    for name in (type_, "image_url", "url", "path", "base64", kind):
        value = item.get(name)
        if value is None:
            continue
        key = f"{place}.{name}"
        if type_ == "input_audio":
            subtype = check_text(check_object(value, key).get("format") or "wav", f"{key}.format")
            data = check_text(part(value, key, "data"), f"{key}.data")
            return read_media(f"data:audio/{subtype};base64,{data}", kind, f"{key}.data", options)
        if name == "base64":
            value = f"data:;base64,{check_text(value, key)}"
        return read_media(value, kind, key, options)
    return None
