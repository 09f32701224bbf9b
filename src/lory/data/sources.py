"""Sources: one entry of the config's data list becomes conversations, with a count of everything that was left out."""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib.resources
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from lory.config import Section
from lory.data.formats import FORMATS, Dropped, convert, fill_placeholders, recognise
from lory.data.identity import identity_conversations
from lory.runtime import LoryError, UsageError, hash_file
from lory.types import Conversation, Message

BUNDLED = ("identity", "general")
"""Names that stand for records of lory's own; a file of that name is reached as ``./identity``."""

Record = tuple[str, dict[str, Any]]
"""Where a record was read (file and line, row or number), and the record."""

# reported, not refused: double braces are also ordinary text, in LaTeX and in templates of code
_LIKE_PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z]\w{2,} ?\}\}")


class SourceConfig(Section):
    """Where records come from, and how they are read."""

    path: str = Field(
        min_length=1,
        description="a file (json, jsonl, csv, tsv, parquet or txt), relative to the working directory; or `identity`, "
        "records that teach a name and an author; or `general`, bundled records that keep general abilities",
    )
    format: str = Field("auto", description=f"the records' format: auto, {', '.join(FORMATS)}")
    sample: int | None = Field(None, ge=1, description="how many records to draw at random; null: all, in file order")
    seed: int = Field(0, description="seed of the draw")
    columns: dict[str, str] = Field(
        default_factory=dict, description="{name that the format expects: name in the file}, where they differ"
    )
    name: str | None = Field(
        None, min_length=1, description="the assistant's name, for `identity` and for {{name}} in the records"
    )
    author: str | None = Field(
        None, min_length=1, description="who made the assistant, for `identity` and for {{author}} in the records"
    )
    system: str | None = Field(None, min_length=1, description="a system prompt for the conversations that have none")

    @field_validator("format")
    @classmethod
    def _check_format(cls, format: str, info: ValidationInfo) -> str:
        if format != "auto" and format not in FORMATS:
            raise ValueError(f"{_suggest(format, ['auto', *FORMATS])}known formats are auto, {', '.join(FORMATS)}")
        if format != "auto" and info.data.get("path") in BUNDLED:
            raise ValueError(f"the bundled records of '{info.data['path']}' have a format of their own; leave this out")
        return format

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if columns and info.data.get("path") in BUNDLED:
            raise ValueError(f"the bundled records of '{info.data['path']}' have no columns to map; leave this out")
        format = info.data.get("format", "auto")
        formats = [FORMATS[format]] if format != "auto" else FORMATS.values()
        known = list(dict.fromkeys(key for format in formats for key in format.keys))
        for key in columns:
            if key not in known:
                raise ValueError(
                    f"'{key}' is not expected by the format; {_suggest(key, known)}known: {', '.join(known)}"
                )
        return columns

    @field_validator("name", "author")
    @classmethod
    def _check_identity(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("path") == "identity":
            raise ValueError("the source `identity` needs both a name and an author, such as name: Lory, author: you")
        return value


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
    """SHA-256 of the file's bytes, or of the generated records."""
    notes: list[str]


@dataclass
class _Tally:
    """What is learnt about a source while its records stream by."""

    format: str
    read: int = 0
    keys: set[str] = field(default_factory=set)


def read_source(config: SourceConfig) -> SourceData:
    """Read, draw and convert the records of a source.

    Raises:
        UsageError: a file or record that cannot be read as what it should be; the sentence names file and line.
    """
    name, records, fingerprint = _open(config)
    tally = _Tally("" if config.format == "auto" else config.format)
    stream: Iterable[Record] = _prepare(records, config, tally)
    if config.sample is not None:
        stream = _draw(stream, config.sample, config.seed)
    conversations, dropped = _convert_all(stream, config, tally)
    if not tally.read:
        raise UsageError(f"{name} has no records; at least one is expected.")
    if absent := [column for column in config.columns.values() if column not in tally.keys]:
        raise UsageError(f"{name} has no record with '{absent[0]}', which 'columns' names; {_found(tally.keys)}.")
    if not conversations:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UsageError(f"{name} has no record to learn from: {reasons}.")
    short_name = Path(name).name
    return SourceData(
        name=short_name,
        conversations=conversations,
        read=tally.read,
        dropped=dict(dropped),
        fingerprint=fingerprint,
        notes=_collect_notes(short_name, config, tally, conversations),
    )


def _open(config: SourceConfig) -> tuple[str, Iterable[Record], str]:
    """The source's name for errors, its records, and its fingerprint."""
    if config.path == "identity":
        identity = _generate_identity(config)
        lines = json.dumps([record for _, record in identity], ensure_ascii=False)
        return "identity", identity, hashlib.sha256(lines.encode()).hexdigest()
    if config.path == "general":
        content = _read_general()
        return "general", _parse_lines("general", content.decode().split("\n")), hashlib.sha256(content).hexdigest()
    path = Path(os.path.expanduser(config.path))
    try:
        return str(path), _read_file(path, _choose_reader(path)), hash_file(path)
    except OSError as error:
        raise UsageError(f"{path} could not be read: {error.strerror}.") from error


def _generate_identity(config: SourceConfig) -> list[Record]:
    assert config.name is not None  # the config's validators see to both
    assert config.author is not None
    return [
        (conversation.where, {"messages": [message.to_dict() for message in conversation.messages]})
        for conversation in identity_conversations(config.name, config.author)
    ]


def _read_general() -> bytes:
    return (importlib.resources.files("lory.data") / "texts" / "general.jsonl").read_bytes()


def _prepare(records: Iterable[Record], config: SourceConfig, tally: _Tally) -> Iterator[Record]:
    """Count the records, map their columns, and let the first one decide on the format."""
    for where, record in records:
        tally.read += 1
        tally.keys.update(record)
        if config.columns:
            record = _map_columns(record, config.columns, where)
        if not tally.format:
            try:
                tally.format = recognise(record)
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
        yield where, record


def _map_columns(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    required = {key for format in FORMATS.values() for key in format.required}
    for expected, name in columns.items():
        if name not in record and expected in required:
            near = _suggest(name, list(record))
            raise UsageError(
                f"{where}: 'columns' takes '{expected}' from '{name}', which is not there; {near}{_found(record)}."
            )
    rest = {key: value for key, value in record.items() if key not in columns.values()}
    return rest | {expected: record[name] for expected, name in columns.items() if name in record}


def _draw(records: Iterable[Record], count: int, seed: int) -> list[Record]:
    """`count` records at random, or all if there are fewer, in shuffled order.

    A reservoir: each record is as likely as any other, and no more than `count` are ever held.
    """
    generator = random.Random(seed)
    kept: list[Record] = []
    for number, record in enumerate(records):
        if number < count:
            kept.append(record)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = record
    generator.shuffle(kept)
    return kept


def _convert_all(
    records: Iterable[Record], config: SourceConfig, tally: _Tally
) -> tuple[list[Conversation], Counter[str]]:
    fill = {"name": config.name, "author": config.author} if config.name and config.author else None
    system = fill_placeholders(config.system, fill, "The source's 'system'") if config.system else None
    conversations: list[Conversation] = []
    dropped: Counter[str] = Counter()
    for where, record in records:
        try:
            conversation = convert(record, tally.format, where, fill)
        except Dropped as drop:
            dropped[drop.reason] += 1
            continue
        if system and conversation.messages and conversation.messages[0].role != "system":
            conversation = replace(conversation, messages=(Message("system", system), *conversation.messages))
        conversations.append(conversation)
    return conversations, dropped


def _collect_notes(name: str, config: SourceConfig, tally: _Tally, conversations: Sequence[Conversation]) -> list[str]:
    notes = []
    if config.sample is not None and config.sample > tally.read:
        notes.append(f"sample: {config.sample} was asked for, {name} has {tally.read} records: all were taken")
    elif config.sample is not None:
        notes.append(f"sample: {config.sample} of {tally.read} records were drawn (seed {config.seed})")
    used = {*FORMATS[tally.format].keys, *config.columns.values()}
    if unused := sorted(tally.keys - used):
        notes.append(f"keys that the format {tally.format} does not use: {', '.join(unused)}")
    if duplicates := len(conversations) - len(set(conversations)):
        notes.append(f"{duplicates} exact duplicate{'s' if duplicates > 1 else ''}")
    like = [
        match[0] for conversation in conversations if (match := _LIKE_PLACEHOLDER.search(_whole_text(conversation)))
    ]
    if like:
        notes.append(f"{like[0]} looks like a placeholder ({len(like)} such records); it was kept as text")
    return notes


def _whole_text(conversation: Conversation) -> str:
    return conversation.text or "\n".join(message.content for message in conversation.messages)


# Files. A reader yields the records of one file, each with its place.


def _choose_reader(path: Path) -> Callable[[Path], Iterator[Record]]:
    """The reader for a path's ending, when there is a file to read."""
    if path.is_dir():
        inside = sorted(item.name for item in path.iterdir() if item.suffix.lower() in READERS and item.is_file())
        remedy = f"such as {path / inside[0]}" if inside else f"ending in {_endings()}"
        raise UsageError(f"{path} is a folder; name one of its files, {remedy}.")
    if not path.exists():
        raise UsageError(_explain_missing(path))
    if path.suffix.lower() not in READERS:
        raise UsageError(f"{path} ends in '{path.suffix}'; a data file ends in {_endings()}.")
    return READERS[path.suffix.lower()]


def _explain_missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}; relative paths start at {Path.cwd()}."
    names = [item.name for item in path.parent.iterdir()] + (list(BUNDLED) if path.parent == Path() else [])
    near = difflib.get_close_matches(path.name, names, n=1)
    remedy = f"did you mean '{path.parent / near[0]}'?" if near else f"relative paths start at {Path.cwd()}."
    return f"{path} does not exist; {remedy}"


def _read_file(path: Path, reader: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty; at least one record is expected.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} line {_find_undecodable(path)} is not UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        raise UsageError(f"{path} could not be read: {error.strerror or error}.") from error


def _find_undecodable(path: Path) -> int:
    """The number of the first line that is not UTF-8; a text file's decoder knows only its own block."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise LoryError(f"{path} changed while it was read; try again.")


def _read_json(path: Path) -> Iterator[Record]:
    """An array of records, an object with the array under "data", or, whatever the ending says, JSON lines."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path)
            return
        raise UsageError(_explain_json(path, 1, error)) from error
    del text  # it may be large
    if isinstance(value, dict):
        value = _find_list(value, path)
    if not isinstance(value, list):
        raise UsageError(f"{path} holds the single value {json.dumps(value)[:40]}; an array of records is expected.")
    for number, record in enumerate(value, 1):
        where = f"{path} record {number}"
        yield where, _check_object(record, where)


def _find_list(value: dict[str, Any], path: Path) -> list[Any]:
    if isinstance(value.get("data"), list):
        return value["data"]
    try:
        recognise(value)
    except UsageError:
        raise UsageError(
            f"{path} holds one object, neither a record nor a list of records under 'data'; {_found(value)}."
        ) from None
    return [value]  # JSON lines of one line


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        yield from _parse_lines(str(path), file)


def _parse_lines(name: str, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # with its newline, an error at the end of a line would be one of the next line
            record = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            raise UsageError(_explain_json(name, number, error)) from error
        where = f"{name} line {number}"
        yield where, _check_object(record, where)


def _explain_json(name: Path | str, line: int, error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{name} line {line + error.lineno - 1} is not valid JSON: {error.msg} (column {error.colno})."
    return f"{name} line {line} is not usable JSON: {error}."


def _check_object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        kind = "a list" if isinstance(record, list) else f"the value {json.dumps(record)[:40]}"
        raise UsageError(f'{where} is {kind}; an object such as {{"instruction": ..., "output": ...}} is expected.')
    return record


def _read_csv(path: Path) -> Iterator[Record]:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Iterator[Record]:
    return _read_table(path, "\t")


def _read_table(path: Path, delimiter: str) -> Iterator[Record]:
    row = end = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a quote that is never closed would swallow the rest of the file
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise UsageError(f"{path} line 1: the header has the column '{twice[0]}' twice; rename one.")
            end = reader.line_num
            for cells in reader:
                start, end = end + 1, reader.line_num
                if not cells:
                    continue
                row += 1
                where = f"{path} row {row} (line {start})"
                if len(cells) != len(header):
                    raise UsageError(f"{where} has {len(cells)} cells, but the header has {len(header)}.")
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UsageError(
                f"{path} line {end + 1} begins a broken row: {error}; look for a quote that is never closed, "
                "and use JSON lines for cells of more than 131,072 characters."
            ) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path} row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is no readable Parquet file after row {row}: {str(error).splitlines()[0]}."
        ) from error


def _read_txt(path: Path) -> Iterator[Record]:
    """One document a line; blank lines part nothing."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", {"text": line.removesuffix("\n").removesuffix("\r")}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    "": _read_json,  # a file without an ending, such as ./identity
}


def _endings() -> str:
    return ", ".join(ending for ending in READERS if ending)


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'? " if near else ""


def _found(keys: Iterable[str]) -> str:
    return f"the keys found are {', '.join(sorted(keys)[:12])}"
