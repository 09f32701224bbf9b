"""Sources: one entry of the config's data list becomes conversations, with a count of everything that was left out."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lory.data.records.formats import FORMATS, Dropped, ReadOptions, convert, explain, fill_placeholders, recognise
from lory.data.sources.config import BUNDLED, SourceConfig, suggest
from lory.data.sources.locate import locate, resolve
from lory.data.sources.rows import BadRow, DroppedRow, Row, combine_fingerprints
from lory.data.sources.sampling import draw, passes
from lory.runtime import UsageError
from lory.types import Conversation, Message

__all__ = ["BUNDLED", "SourceConfig", "SourceData", "SourceReader", "explain_source", "open_source", "read_source"]

FILTERED = "does not pass the filter"
"""The reason under which records are counted that the source's conditions leave out."""

Record = tuple[str, Any]

# reported, not refused: double braces are also ordinary text, in LaTeX and in templates of code
_LIKE_PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z]\w{2,} ?\}\}")
_NUMBER = re.compile(r"\d+")
_MOST_REASONS = 20
"""How many kinds of malformed records are told apart."""


@dataclass(frozen=True)
class SourceData:
    """What a source gave.

    `read` counts the records that are there, `dropped` the drawn ones that were left out, by reason. Unless a sample
    was drawn, `read` is the number of conversations and of dropped records together.
    """

    name: str
    conversations: list[Conversation]
    read: int
    dropped: dict[str, int]
    fingerprint: str
    """SHA-256 of the content: of the file's bytes, of those of all files, or of the generated records."""
    notes: list[str]


class SourceReader:
    """A source's conversations, read as they are asked for; what is counted grows meanwhile, and starts anew each time.

    Attributes:
        name: the end of the path, or the data set's name.
        read: how many records were read.
        dropped: how many of them (of a sample: of those that were drawn) were left out, by reason.
        position: where to start to go on after the last conversation (see `open_source`).
    """

    def __init__(self, config: SourceConfig, start: int = 0) -> None:
        self.config = resolve(config)
        self._start = start
        self._origin = locate(self.config)
        if self.config is not config:  # the name alone would not tell when the registry's entry changes
            self._origin = replace(
                self._origin,
                short_name=config.path,
                mark=hashlib.sha256((self.config.model_dump_json() + self._origin.mark).encode()).hexdigest(),
            )
        config = self.config
        self._sample = config.sample or self._origin.sample
        self.name = self._origin.short_name
        self._fill = {"name": config.name, "author": config.author} if config.name and config.author else None
        system = fill_placeholders(config.system, self._fill, "The source's 'system'") if config.system else ""
        self._system = (Message("system", system),) if system else ()
        root = config.media_root or self._origin.rows.folder
        self._options = ReadOptions(root, config.question or "", config.media_first)
        self._reset()

    def _reset(self, format: str = "") -> None:
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.position = self._start
        self._format = format or self._origin.format or self.config.format.replace("auto", "")
        self._keys: set[str] = set()
        self._bad: dict[str, str] = {}
        self._like: Counter[str] = Counter()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, whatever the files are called."""
        content = self._origin.rows.fingerprint()
        return combine_fingerprints([content, self._origin.mark]) if self._origin.mark else content

    @property
    def media_root(self) -> str:
        """The folder that paths of images, sounds and videos start from; empty: the working one."""
        return self._options.media_root

    @property
    def reading(self) -> str:
        """How the content is read, as far as the files' names decide that."""
        return self._origin.rows.reading

    def __iter__(self) -> Iterator[Conversation]:
        """The conversations in order.

        Raises:
            UsageError: a file or record that cannot be read as what it should be; the sentence names file and line.
                Or nothing to learn from, at the end.
        """
        self._reset()
        given = 0
        for where, record in self._choose_records():
            try:
                conversation = (
                    replace(record, where=where)  # a function of the user's own made it
                    if isinstance(record, Conversation)
                    else convert(record, self._format, where, self._fill, self._options)
                )
            except Dropped as drop:
                self.dropped[drop.reason] += 1
                continue
            except UsageError as error:
                self._count_bad(where, error)
                continue
            if self._system and conversation.messages and conversation.messages[0].role != "system":
                conversation = replace(conversation, messages=self._system + conversation.messages)
            self._look_for_placeholders(conversation)
            given += 1
            yield conversation
        self._check(given)

    def _choose_records(self) -> Iterator[Record]:
        """The records to convert: all, or those that are drawn."""
        if self._sample is None:
            if self._start and not self._format:
                # the source's first record tells the format, wherever reading starts
                next(self._prepare(self._origin.rows.read()), None)
                self._reset(self._format)
            yield from self._prepare(self._origin.rows.read(self._start))
            return
        drawn = draw(self._prepare(self._origin.rows.read()), self._sample, self.config.seed)
        self.position = self._start
        for record in itertools.islice(drawn, self._start, None):
            self.position += 1
            yield record

    def _prepare(self, rows: Iterable[Row]) -> Iterator[Record]:
        """Count the rows, leave out those that are no record or filtered out, and let the first one tell the format."""
        conditions, columns, rewrite = self.config.filter, self.config.columns, self._origin.rewrite
        for where, record in rows:
            self.read += 1
            self.position += 1
            if not isinstance(record, dict):
                self._leave_out(where, record)
                continue
            if not self._keys.issuperset(record):
                self._keys.update(record)
            if conditions and not passes(record, conditions):
                self.dropped[FILTERED] += 1
                continue
            if rewrite:
                record = rewrite(record)
                if not isinstance(record, dict | Conversation):
                    self._leave_out(where, record)
                    continue
            elif columns or not self._format:
                try:
                    record = _map_columns(record, columns, where) if columns else record
                    self._format = self._format or _recognise(record, where)
                except UsageError as error:
                    self._count_bad(where, error)
                    continue
            yield where, record

    def _leave_out(self, where: str, value: Any) -> None:
        """A row that is no record: dropped by its origin, or bad."""
        if isinstance(value, DroppedRow):
            self.dropped[value.reason] += 1
            return
        if isinstance(value, BadRow):
            problem = value.problem
        else:
            shown = "a list" if isinstance(value, list) else f"the value {json.dumps(value, default=str)[:40]}"
            problem = f'is {shown}; an object such as {{"instruction": ..., "output": ...}} is expected'
        self._count_bad(where, UsageError(f"{where} {problem}."))

    def _count_bad(self, where: str, error: UsageError) -> None:
        if self.config.on_bad == "error":
            raise error
        problem = str(error).removeprefix(where).removeprefix(":").strip().rstrip(".")
        # the same problem in another row differs in its numbers
        reason = f"malformed: {_NUMBER.sub('#', problem)[:160]}"
        if reason not in self._bad and len(self._bad) >= _MOST_REASONS:
            reason = "malformed in another way"
        self._bad.setdefault(reason, str(error))
        self.dropped[reason] += 1

    def _look_for_placeholders(self, conversation: Conversation) -> None:
        for text in (conversation.text, *(message.content for message in conversation.messages)):
            if text and "{{" in text and (match := _LIKE_PLACEHOLDER.search(text)):
                # all under the first one: there may be millions of different ones
                self._like[next(iter(self._like), match[0])] += 1
                return

    def _check(self, given: int) -> None:
        """What can only be said when all is read; one that starts in the middle may find nothing left."""
        if self._start:
            return
        name = self._origin.rows.name
        if not self.read:
            what = f"no records in the split '{self.config.split}'" if self.config.split else "no records"
            raise UsageError(f"{name} has {what}; at least one is expected.")
        # a condition may be on a value inside of a column
        wanted = [("columns", column, column) for column in self.config.columns.values()]
        wanted += [("filter", column, column.partition(".")[0]) for column in self.config.filter]
        for field, column, outer in wanted:
            if column not in self._keys and outer not in self._keys:
                raise UsageError(f"{name} has no record with '{column}', which '{field}' names; {_found(self._keys)}.")
        if not given:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            first = next(iter(self._bad.values()), "")
            raise UsageError(f"{name} has no record to learn from: {reasons}.{' ' if first else ''}{first}")

    @property
    def notes(self) -> list[str]:
        """What a person should know about what was read so far."""
        notes = []
        if self._sample is not None:
            there = self.read - sum(self.dropped[reason] for reason in (FILTERED, *self._bad))
            if self._sample > there:
                notes.append(f"sample: {self._sample} was asked for, {self.name} has {there} records: all were taken")
            else:
                notes.append(f"sample: {self._sample} of {there} records were drawn (seed {self.config.seed})")
        notes += [f"{reason}: {self.dropped[reason]}; the first is: {first}" for reason, first in self._bad.items()]
        used = {*(FORMATS[self._format].keys if self._format else ()), *self.config.columns.values()}
        # a dataset_info.json names the columns that it uses; the others are not looked at
        if not self._origin.format and (unused := sorted(self._keys - used - set(self.config.filter))):
            notes.append(f"keys that the format {self._format} does not use: {', '.join(unused)}")
        if self._like:
            like = next(iter(self._like))
            notes.append(f"{like} looks like a placeholder ({self._like.total()} such records); it was kept as text")
        return notes


def open_source(config: SourceConfig, start: int = 0) -> SourceReader:
    """A source's conversations, to be read one by one in constant memory (a sample is held as a whole).

    Args:
        start: the number of records to pass over: `SourceReader.position` of a reader that came so far.

    Raises:
        UsageError: there is nothing at the source's path.
    """
    return SourceReader(config, start)


def read_source(config: SourceConfig) -> SourceData:
    """All conversations of a source in a list.

    Raises:
        UsageError: a file or record that cannot be read as what it should be; the sentence names file and line.
    """
    reader = open_source(config)
    conversations = list(reader)
    notes = reader.notes
    if duplicates := len(conversations) - len(set(conversations)):
        notes.append(f"{duplicates} exact duplicate{'s' if duplicates > 1 else ''}")
    return SourceData(reader.name, conversations, reader.read, dict(reader.dropped), reader.fingerprint, notes)


def _recognise(record: Mapping[str, Any], where: str) -> str:
    try:
        return recognise(record)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


_REQUIRED = frozenset(key for format in FORMATS.values() for key in format.required)


def _map_columns(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    for expected, name in columns.items():
        if name not in record and expected in _REQUIRED:
            near = suggest(name, list(record))
            raise UsageError(
                f"{where}: 'columns' takes '{expected}' from '{name}', which is not there; {near}{_found(record)}."
            )
    taken = columns.values()
    rest = {key: value for key, value in record.items() if key not in taken}
    return rest | {expected: record[name] for expected, name in columns.items() if name in record}


def _found(keys: Iterable[str]) -> str:
    return f"the keys found are {', '.join(sorted(keys)[:12])}"


@dataclass(frozen=True)
class Explanation:
    """What the first records of a source look like, and what becomes of them."""

    name: str
    keys: dict[str, dict[str, int]]
    """For each key, how often its value is of which type."""
    records: int
    """How many records were looked at."""
    format: str
    """The format that they are read in; empty if none fits."""
    close: dict[str, list[str]]
    """Formats that need keys which are not there, but have others: the missing ones."""
    unused: list[str]
    first: str
    """How the first record is read, or why it is not."""

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def explain_source(config: SourceConfig, records: int = 100) -> Explanation:
    """What is found in a source's first records, and how it is understood; a problem is told, not raised.

    Raises:
        UsageError: the source cannot be read at all, or has no records.
    """
    reader = SourceReader(config)
    rows = [value for _, value in itertools.islice(reader._origin.rows.read(), records) if isinstance(value, dict)]
    if not rows:
        raise UsageError(f"{reader.name} has no records; at least one is expected.")
    keys: dict[str, Counter[str]] = {}
    for row in rows:
        for key, value in row.items():
            keys.setdefault(key, Counter())[_TYPES.get(type(value), type(value).__name__)] += 1
    first: Any = _map_columns(rows[0], config.columns, "the first record") if config.columns else rows[0]
    if rewrite := reader._origin.rewrite:
        first = rewrite(first)
    format, told = reader._format, ""
    if not isinstance(first, dict):
        told = repr(first)
    elif not format:
        try:
            format = recognise(first)
        except UsageError as error:
            told = str(error)
    close = {
        name: missing
        for name, rules in FORMATS.items()
        if (missing := [key for key in rules.required if key not in keys]) and len(missing) < len(rules.required)
    }
    used = {*(FORMATS[format].keys if format else ()), *config.columns.values()}
    return Explanation(
        name=reader.name,
        keys={key: dict(types) for key, types in keys.items()},
        records=len(rows),
        format=format,
        close=close,
        unused=[] if reader._origin.format else sorted(set(keys) - used),
        first=told or explain(first, format, reader._fill, reader._options),
    )


_TYPES = {str: "text", int: "number", float: "number", bool: "truth value", list: "list", dict: "object"}
_TYPES |= {bytes: "bytes", type(None): "null"}
