"""The config of a source: where records come from and how they are read, in the long form or in the short one."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lory.config import Section
from lory.data.records.formats import FORMATS
from lory.data.sources.compressed import MAX_BYTES
from lory.data.sources.dataset_info import find_info, list_entries
from lory.data.sources.download import is_url
from lory.data.sources.hub import Hub
from lory.data.sources.sampling import Condition, parse_split

BUNDLED = ("identity", "general")
"""Names that stand for records of lory's own; a file of that name is reached as ``./identity``."""

_PREFIXES: dict[str, Hub] = {"HF::": "hf", "MS::": "modelscope"}
_SAMPLE = re.compile(r"(?P<path>.+)#(?P<sample>\d+)")
# neither C:\data nor C:/data
_SUBSET = re.compile(r"(?P<path>.{2,}|[^A-Za-z]):(?P<subset>[^:\\]+)")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ELSEWHERE = ("source", "subset", "revision", "dataset")


class SourceConfig(Section):
    """Where records come from, and how they are read; the text ``path:subset#500`` is the short form."""

    path: str = Field(
        min_length=1,
        description="a file (json, jsonl, csv, tsv, parquet, arrow or txt, also compressed), a folder, a pattern such "
        "as data/*.jsonl, an address on the web, or a data set on a hub (owner/name); relative to the working "
        "directory; or `identity`, records that teach a name and an author; or `general`, bundled records that keep "
        "general abilities",
    )
    source: Hub | None = Field(None, description="the hub of owner/name: hf or modelscope; null: by its owner")
    subset: str | None = Field(
        None, min_length=1, description="a subset of a data set on a hub, or a folder inside of the folder; a/b is both"
    )
    split: str | None = Field(
        None,
        description="a split, a part of it or a sum of such, as in train, [:500], train[10%:20%] or train+test; null: "
        "train, or all files",
    )
    revision: str | None = Field(None, min_length=1, description="branch, tag or commit of a data set on a hub")
    streaming: bool = Field(False, description="read a data set on a hub as it is needed instead of downloading it")
    dataset: str | None = Field(
        None,
        min_length=1,
        description="a name in the dataset_info.json (LLaMA-Factory's) that `path` is or holds",
    )
    format: str = Field(
        "auto",
        description=f"the records' format: auto, {', '.join(FORMATS)}; or a function of one's own, as module:function",
    )
    filter: dict[str, Condition] = Field(
        default_factory=dict,
        description="only records whose columns are so: {column: value}, {column: [one, other]}, {column: not null}, "
        "{column: {min: 0.5, max_characters: 200}}; the names are those in the file",
    )
    sample: int | None = Field(None, ge=1, description="how many records to draw at random; null: all, in file order")
    seed: int = Field(0, description="seed of the draw")
    weight: float | None = Field(None, gt=0, description="the source's weight where sources are mixed; null: 1")
    columns: dict[str, str] = Field(
        default_factory=dict, description="{name that the format expects: name in the file}, where they differ"
    )
    on_bad: Literal["error", "drop"] = Field(
        "error",
        description="what happens to a malformed record, or one that the chat template refuses: error, or drop, which "
        "counts them by reason",
    )
    max_bytes: int = Field(
        MAX_BYTES, ge=1, description="the most that one file may have, unpacked or downloaded; a guard against bombs"
    )
    media_root: str | None = Field(
        None, min_length=1, description="the folder of images, sounds and videos; null: that of the data file"
    )
    media_first: bool = Field(
        False, description="put media that no mark such as <image> places before the first question"
    )
    question: str | None = Field(None, min_length=1, description="what is asked about each image of image_text records")
    name: str | None = Field(
        None, min_length=1, description="the assistant's name, for `identity` and for {{name}} in the records"
    )
    author: str | None = Field(
        None, min_length=1, description="who made the assistant, for `identity` and for {{author}} in the records"
    )
    system: str | None = Field(None, min_length=1, description="a system prompt for the conversations that have none")

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: Any) -> Any:
        return read_short_form(value) if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(core_schema)]}

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str | None) -> str | None:
        if split is not None:
            parse_split(split)
        return split

    @field_validator("format")
    @classmethod
    def _check_format(cls, format: str, info: ValidationInfo) -> str:
        if format != "auto" and format not in FORMATS and not is_function(format):
            raise ValueError(f"{suggest(format, ['auto', *FORMATS])}known formats are auto, {', '.join(FORMATS)}")
        if format != "auto" and info.data.get("path") in BUNDLED:
            raise ValueError(f"the bundled records of '{info.data['path']}' have a format of their own; leave this out")
        return format

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if columns and info.data.get("path") in BUNDLED:
            raise ValueError(f"the bundled records of '{info.data['path']}' have no columns to map; leave this out")
        format = info.data.get("format", "auto")
        if columns and is_function(format):
            raise ValueError("a function of one's own is given the columns as they are; leave this out")
        formats = [FORMATS[format]] if format in FORMATS else FORMATS.values()
        known = list(dict.fromkeys(key for format in formats for key in format.keys))
        for key in columns:
            if key not in known:
                raise ValueError(
                    f"'{key}' is not expected by the format; {suggest(key, known)}known: {', '.join(known)}"
                )
        return columns

    @field_validator("name", "author")
    @classmethod
    def _check_identity(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("path") == "identity":
            raise ValueError("the source `identity` needs both a name and an author, such as name: Lory, author: you")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> SourceConfig:
        if self.path in BUNDLED and (given := [field for field in _ELSEWHERE if getattr(self, field) is not None]):
            raise ValueError(f"the bundled records of '{self.path}' have no {given[0]}; leave '{given[0]}' out")
        if self.dataset and (self.format != "auto" or self.columns):
            raise ValueError("with 'dataset', dataset_info.json says format and columns; leave them out")
        return self


def read_short_form(text: str) -> dict[str, Any]:
    """The long form of ``path``, ``path:subset``, ``path#500`` and ``path:subset#500``.

    The name of a file that is there stands for the file, whatever signs are in it. ``HF::`` and ``MS::`` before a data
    set's name say the hub, and ``dir/dataset_info.json:name`` (or ``dir:name``) takes a data set of that file.
    """
    value: dict[str, Any] = {"path": text}
    for prefix, hub in _PREFIXES.items():
        if text.startswith(prefix):
            value = {"path": text.removeprefix(prefix), "source": hub}
    if "source" not in value and is_there(text):
        return value
    if match := _SAMPLE.fullmatch(value["path"]):
        value |= {"path": match["path"], "sample": int(match["sample"])}
    if is_url(value["path"]) or ("source" not in value and is_there(value["path"])):
        return value
    if match := _SUBSET.fullmatch(value["path"]):
        info = find_info(Path(match["path"]).expanduser())
        named = info is not None and match["subset"] in list_entries(info)
        is_info = info is not None and info == Path(match["path"]).expanduser()
        value |= {"path": match["path"], "dataset" if named or is_info else "subset": match["subset"]}
    return value


def is_function(format: str) -> bool:
    """Whether a format is the name of a function of the user's own, as in my_data:read_record."""
    return bool(_FUNCTION.fullmatch(format))


def is_there(path: str) -> bool:
    """Whether there is a file or folder of that name."""
    return os.path.exists(os.path.expanduser(path))


def suggest(name: str, known: Sequence[str]) -> str:
    """A question for the nearest known name; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'? " if near else ""
