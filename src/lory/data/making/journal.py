"""A journal of paid-for replies: each is on the disk before it is used, so that a crash costs none of them twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lory.runtime import UsageError, explain_os_error


@dataclass(frozen=True)
class Reply:
    """What a chat API answered."""

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """Replies by the name of their call, in a file of one JSON object a line; the first line has the settings.

    Attributes:
        replies: those that are there.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or begin a journal.

        Args:
            settings: what the calls depend on; a journal of other settings is refused.

        Raises:
            UsageError: the journal is of other settings, or it is damaged beyond its last line.
            LoryError: the file cannot be written.
        """
        self.path = path
        self.replies: dict[str, Reply] = {}
        try:
            self._file = path.open("a+b")
            before = self._read()
            if self.replies:
                self._check(before, settings)
            else:  # nothing was paid for under whatever settings it had
                self._file.truncate(0)
        except OSError as error:
            raise explain_os_error(error, f"open {path}") from error
        if not self.replies:
            self._write({"settings": dict(settings)})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self) -> dict[str, Any]:
        """The settings that the journal was begun with. A last line without its end was never used: it is cut off."""
        self._file.seek(0)
        end = 0
        settings: dict[str, Any] = {}
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                value = json.loads(line)
                if number == 1:
                    settings = dict(value["settings"])
                else:
                    call = value.pop("call")
                    self.replies[call] = Reply(**value)
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self.path}, line {number} is not what this journal holds; remove the line, or choose another "
                    "output file."
                ) from error
        self._file.truncate(end)
        return settings

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        # through JSON, in which a tuple is a list
        now = json.loads(json.dumps(now))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            shown = ", ".join(f"{key} (was {_show(before.get(key))}, is {_show(now.get(key))})" for key in changed)
            raise UsageError(
                f"{self.path} was begun with other settings: {shown}; go on with the old ones, or choose another "
                "output file."
            )

    def add(self, call: str, reply: Reply) -> None:
        """Put a reply on the disk.

        Raises:
            LoryError: the disk is full.
        """
        self._write({"call": call, **asdict(reply)})
        self.replies[call] = reply

    def _write(self, value: Mapping[str, Any]) -> None:
        try:
            # in ASCII, which also holds the half characters that a model may write
            self._file.write(json.dumps(value).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise explain_os_error(error, f"write {self.path}") from error


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
