"""LLaMA-Factory's dataset_info.json, read as it is: its data sets become records in the format `messages`."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from lory.config import Section
from lory.data.sources.rows import BadRow, DroppedRow
from lory.runtime import UsageError, read_json

FILE_NAME = "dataset_info.json"


class _Loose(Section):
    """The file has keys for other tools, too."""

    model_config = ConfigDict(extra="ignore")


class Columns(_Loose):
    """Which column holds what; None: no column does."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class Tags(_Loose):
    """How a message says who speaks, and what."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


class Entry(_Loose):
    """One data set of the file."""

    file_name: str | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    om_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = Field(None, ge=1)
    columns: Columns = Columns()
    tags: Tags = Tags()

    def fingerprint(self) -> str:
        """SHA-256 of what changes the records: how many are drawn and how they are read, not where they lie."""
        parts = self.model_dump(include={"formatting", "ranking", "columns", "tags", "num_samples"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_info(path: Path) -> Path | None:
    """The dataset_info.json that a path means: itself, or the one in the folder; None if it means none."""
    info = path / FILE_NAME if os.path.isdir(path) else path
    return info if info.name == FILE_NAME and os.path.isfile(info) else None


def list_entries(info: Path) -> list[str]:
    """The names in the file; empty if it is a file of that name with another purpose."""
    value = read_json(info)
    sources = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
    if not isinstance(value, dict):
        return []
    return [
        name
        for name, entry in value.items()
        if isinstance(entry, dict) and any(isinstance(entry.get(key), str) for key in sources)
    ]


def read_entry(info: Path, name: str) -> Entry:
    """The data set `name` of the file.

    Raises:
        UsageError: there is no such data set, or it is not described as one.
    """
    value = read_json(info)
    if not isinstance(value, dict):
        raise UsageError(f"{info} holds a {type(value).__name__}; an object of data sets is expected.")
    if name not in value:
        near = difflib.get_close_matches(name, value, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(list(value)[:12])}."
        raise UsageError(f"{info} has no data set '{name}'; {remedy}")
    try:
        entry = Entry.model_validate(_fill_columns(value[name]))
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join([name, *map(str, detail["loc"])])
        raise UsageError(f"{info}: '{place}' was given {detail['input']!r}: {detail['msg']}.") from None
    for key in ("script_url", "om_hub_url", "cloud_file_name"):
        if getattr(entry, key) and not (entry.file_name or entry.hf_hub_url or entry.ms_hub_url):
            raise UsageError(f"{info}: '{name}' comes from a '{key}', which is not read; download it to a file.")
    if not (entry.file_name or entry.hf_hub_url or entry.ms_hub_url):
        raise UsageError(f"{info}: '{name}' has none of file_name, hf_hub_url and ms_hub_url; add one.")
    return entry


def _fill_columns(value: Any) -> Any:
    """Where an entry names columns, those that it does not name are not there."""
    if isinstance(value, dict) and isinstance(value.get("columns"), dict):
        return value | {"columns": dict.fromkeys(Columns.model_fields) | value["columns"]}
    return value


@dataclass(frozen=True)
class Rewriter:
    """Turns an entry's records into records of the formats that lory knows: `messages`, or a pair of answers.

    A record that cannot be turned becomes a `BadRow`; one whose kto_tag says that its answer is to be avoided, a
    `DroppedRow`.
    """

    entry: Entry

    @property
    def format(self) -> str:
        """The format of what comes out."""
        return "preference" if self.entry.ranking else "messages"

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | BadRow | DroppedRow:
        try:
            return self._rewrite(record)
        except _Unfit as problem:
            return BadRow(f"is not what {FILE_NAME} describes: {problem}")

    def _rewrite(self, record: dict[str, Any]) -> dict[str, Any] | DroppedRow:
        columns = self.entry.columns
        if columns.kto_tag and record.get(columns.kto_tag) is not True:
            if record.get(columns.kto_tag) is False:
                return DroppedRow(f"its answer is to be avoided ({columns.kto_tag})")
            raise _Unfit(f"'{columns.kto_tag}' is neither true nor false")
        turn = self._alpaca if self.entry.formatting == "alpaca" else self._chat
        result = turn(record)
        for key in ("system", "tools", "images", "videos", "audios"):
            if (column := getattr(columns, key)) and record.get(column) not in (None, "", []):
                result[key] = record[column]
        return result

    def _alpaca(self, record: dict[str, Any]) -> dict[str, Any]:
        columns = self.entry.columns
        messages: list[dict[str, Any]] = []
        if columns.history and record.get(columns.history):
            for pair in _expect_list(record[columns.history], columns.history):
                if not isinstance(pair, list) or len(pair) != 2:
                    raise _Unfit(f"'{columns.history}' holds no pairs of question and answer")
                messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        question = [record.get(column) for column in (columns.prompt, columns.query) if column]
        if not all(isinstance(part, str) or part is None for part in question):
            raise _Unfit(f"'{columns.prompt}' and '{columns.query}' are expected to be text")
        messages.append({"role": "user", "content": "\n".join(part for part in question if part)})
        if self.entry.ranking:
            return self._pair(record, messages, lambda answer: {"role": "assistant", "content": answer})
        answer = {"role": "assistant", "content": _require(record, columns.response, "response")}
        return {"messages": [*messages, answer]}

    def _chat(self, record: dict[str, Any]) -> dict[str, Any]:
        column = self.entry.columns.messages
        items = _expect_list(_require(record, column, "messages"), column or "messages")
        messages = [self._message(item, f"{column}[{number}]") for number, item in enumerate(items)]
        if self.entry.ranking:
            return self._pair(record, messages, lambda answer: self._message(answer, "the answer"))
        return {"messages": messages}

    def _pair(
        self, record: dict[str, Any], messages: Sequence[dict[str, Any]], read: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        columns = self.entry.columns
        chosen = read(_require(record, columns.chosen, "chosen"))
        rejected = read(_require(record, columns.rejected, "rejected"))
        return {"prompt": list(messages), "chosen": [chosen], "rejected": [rejected]}

    def _message(self, item: Any, place: str) -> dict[str, Any]:
        tags = self.entry.tags
        if not isinstance(item, Mapping):
            raise _Unfit(f"'{place}' is no object")
        for tag in (tags.role_tag, tags.content_tag):
            if tag not in item:
                raise _Unfit(f"'{place}' has no '{tag}'; its keys are {', '.join(map(str, item))}")
        role, content = item[tags.role_tag], item[tags.content_tag]
        roles = {tags.user_tag: "user", tags.assistant_tag: "assistant", tags.system_tag: "system"}
        if role == tags.observation_tag:
            return {"role": "tool", "content": content}
        if role == tags.function_tag:
            return {"role": "assistant", "content": "", "tool_calls": _read_calls(content, place)}
        if role is None or role not in roles:
            known = [tag for tag in (*roles, tags.observation_tag, tags.function_tag) if tag]
            raise _Unfit(f"'{place}.{tags.role_tag}' is the unknown role '{role}'; known are {', '.join(known)}")
        message = {"role": roles[role], "content": content}
        if self.entry.formatting == "openai" and item.get("tool_calls"):
            message |= {"tool_calls": item["tool_calls"], "content": content or ""}
        return message


class _Unfit(Exception):
    """What is wrong with a record."""


def _require(record: Mapping[str, Any], column: str | None, what: str) -> Any:
    if not column:
        raise _Unfit(f"the data set's columns name none for '{what}'")
    if column not in record:
        raise _Unfit(f"there is no '{column}'; the keys found are {', '.join(sorted(record)[:12])}")
    return record[column]


def _expect_list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Unfit(f"'{column}' is no list")
    return value


def _read_calls(content: Any, place: str) -> list[dict[str, Any]]:
    """A function call as text: a JSON object, or an array of them, with name and arguments."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise _Unfit(f"'{place}' is a function call, but not JSON: {error}") from None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise _Unfit(f"'{place}' is a function call without a name")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
