"""Writing small data files and reading them as a config's source would, for the tests of sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lory.config import build
from lory.data.sources.read import SourceConfig, SourceData, read_source
from lory.runtime import UsageError
from lory.types import Conversation, Message


def exchange(question: str, answer: str) -> Conversation:
    """One question with its answer."""
    return Conversation((Message("user", question), Message("assistant", answer)))


def dump_lines(records: list[Any], end: str = "\n") -> str:
    """JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


def write(name: str, content: str | bytes) -> str:
    """Write a file in the working directory."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def read(path: str, **fields: Any) -> SourceData:
    """What a source gives whose config has these fields."""
    return read_source(build(SourceConfig, {"path": path, **fields}, "test"))


def error_of(path: str, **fields: Any) -> str:
    """The sentence with which such a source is refused."""
    with pytest.raises(UsageError) as caught:
        read(path, **fields)
    return str(caught.value)
