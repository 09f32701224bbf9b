"""Which rows of a source are taken: slices such as ``train[:10%]``, conditions on columns, and random draws."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from lory.config import Section
from lory.data.sources.rows import Rows, SlicedRows

T = TypeVar("T")

_PART = re.compile(r"(?P<name>[\w.-]*)(\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")


@dataclass(frozen=True, slots=True)
class SplitPart:
    """One part of a split: its name ("" where none was given), and where it begins and ends, as written."""

    name: str
    first: str | None = None
    last: str | None = None

    def apply(self, rows: Rows) -> Rows:
        """The rows that the part takes; counted only where a percentage or a place from the end asks for it."""
        if self.first is None and self.last is None:
            return rows
        counted = any(bound and not bound.isdecimal() for bound in (self.first, self.last))
        count = rows.count() if counted else 0
        first = 0 if self.first is None else _to_row(self.first, count)
        last = None if self.last is None else _to_row(self.last, count)
        return SlicedRows(rows, first, last)


def _to_row(bound: str, count: int) -> int:
    if bound.endswith("%"):
        share = int(bound[:-1])
        place = round(count * abs(share) / 100)
        return place if share >= 0 else max(0, count - place)
    return int(bound) if int(bound) >= 0 else max(0, count + int(bound))


def parse_split(text: str) -> list[SplitPart]:
    """The parts of a split such as ``train``, ``train[:10%]``, ``[100:]`` or ``train[:500]+test``.

    Raises:
        ValueError: it is not of that form.
    """
    parts = []
    for piece in text.split("+"):
        match = _PART.fullmatch(piece.strip())
        if not match or not piece.strip():
            raise ValueError("a split is a name, a slice or both, as in train, [:500] or train[10%:20%]")
        bounds = (match["first"], match["last"])
        if any(bound and bound.endswith("%") and abs(int(bound[:-1])) > 100 for bound in bounds):
            raise ValueError("a share of more than 100% was given")
        parts.append(SplitPart(match["name"], *bounds))
    return parts


def draw(items: Iterable[T], count: int, seed: int) -> list[T]:
    """`count` items at random, or all if there are fewer, in shuffled order.

    A reservoir: each item is as likely as any other, and no more than `count` are ever held.
    """
    generator = random.Random(seed)
    kept: list[T] = []
    for number, item in enumerate(items):
        if number < count:
            kept.append(item)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = item
    generator.shuffle(kept)
    return kept


Scalar = str | bool | int | float | None


class Condition(Section):
    """What a column's value has to be; all that is given must hold."""

    equals: Scalar = Field(None, description="this value")
    differs: Scalar = Field(None, description="any other value than this")
    one_of: list[Scalar] | None = Field(None, min_length=1, description="one of these values")
    none_of: list[Scalar] | None = Field(None, min_length=1, description="none of these values")
    min: float | None = Field(None, description="a number of at least this")
    max: float | None = Field(None, description="a number of at most this")
    min_characters: int | None = Field(None, ge=0, description="text of at least this length, in characters")
    max_characters: int | None = Field(None, ge=0, description="text of at most this length, in characters")
    contains: str | None = Field(None, min_length=1, description="text with this in it (or a list with this element)")
    null: bool | None = Field(None, description="true: null or missing; false: neither")

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: Any) -> Any:
        """A value stands for `equals`, a list for `one_of`, and `null` and `not null` for themselves."""
        if value is None or value == "null":
            return {"null": True}
        if value == "not null":
            return {"null": False}
        if isinstance(value, str | int | float):
            return {"equals": value}
        if isinstance(value, list):
            return {"one_of": value}
        if not isinstance(value, dict):
            return value
        # elsewhere null is what was not given, so asking for it has a field of its own
        given = {name: item for name, item in value.items() if item is not None}
        for name, null in (("equals", True), ("differs", False)):
            if name in value and value[name] is None:
                given["null"] = null
        return given

    @model_serializer(mode="wrap")
    def _leave_out_nulls(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written down reads back as the same condition."""
        return {name: value for name, value in dump(self).items() if value is not None}

    @model_validator(mode="after")
    def _check_something(self) -> Condition:
        if not self.model_fields_set:
            raise ValueError(f"a condition is empty; it may have {', '.join(type(self).model_fields)}")
        return self

    def holds(self, value: Any) -> bool:
        """Whether the value passes; 1 and true are not equal, and null has neither length nor size."""
        return all(_TESTS[name](value, getattr(self, name)) for name in self.model_fields_set)


def _same(value: Any, wanted: Scalar) -> bool:
    if isinstance(value, str) and not isinstance(wanted, str) and wanted is not None:
        return value == str(wanted)  # CSV has only text
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _number(value: Any) -> float:
    """The value as a number, out of text, too, since CSV has only text; NaN, which passes no bound, if it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "equals": _same,
    "differs": lambda value, wanted: not _same(value, wanted),
    "one_of": lambda value, wanted: any(_same(value, item) for item in wanted),
    "none_of": lambda value, wanted: not any(_same(value, item) for item in wanted),
    "min": lambda value, bound: _number(value) >= bound,
    "max": lambda value, bound: _number(value) <= bound,
    "min_characters": lambda value, bound: isinstance(value, str) and len(value) >= bound,
    "max_characters": lambda value, bound: isinstance(value, str) and len(value) <= bound,
    "contains": lambda value, wanted: isinstance(value, str | list) and wanted in value,
    "null": lambda value, wanted: (value is None) == wanted,
}


def passes(record: Mapping[str, Any], conditions: Mapping[str, Condition]) -> bool:
    """Whether all conditions hold; a column that the record has not is null, and ``a.b`` is `b` inside of `a`."""
    return all(condition.holds(find_value(record, column)) for column, condition in conditions.items())


def find_value(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of ``a.b`` in the object `a`; None where there is none."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
