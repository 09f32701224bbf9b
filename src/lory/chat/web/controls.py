"""The decoding options as controls: what `GenerationOptions` says of a field decides how it is shown and set."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from lory.config import build
from lory.generate import GenerationOptions

# the ends of the sliders of fields that go on for ever
_ENDS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 4096),
    "temperature": (0, 2),
    "top_k": (0, 200),
    "repetition_penalty": (0, 2),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "no_repeat_ngram_size": (0, 20),
    "sampling_noise": (0, 2),
}
_FINE = 0.01

# What comes first is what most people turn to
_FIRST = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "on_loop", "seed")


@dataclass(frozen=True)
class Control:
    """How a field is shown."""

    name: str
    kind: Literal["slider", "check", "choice", "number"]
    """A number may be left empty, which is None."""
    info: str
    value: Any
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The field's name as words."""
        return self.name.replace("_", " ")


def list_controls(options: GenerationOptions) -> list[Control]:
    """A control for each field of `GenerationOptions`, set to what it is in `options`."""
    fields = GenerationOptions.model_fields
    names = [*_FIRST, *(name for name in fields if name not in _FIRST)]
    return [_make_control(name, fields[name], getattr(options, name)) for name in names if name in fields]


def read_controls(controls: Sequence[Control], values: Sequence[Any]) -> GenerationOptions:
    """The options that the controls are set to.

    Raises:
        UsageError: a value does not fit; the sentence names it.
    """
    pairs = zip(controls, values, strict=True)
    return build(GenerationOptions, {control.name: _read(control, value) for control, value in pairs}, "options")


def _read(control: Control, value: Any) -> Any:
    # pages give whole numbers as 40.0, and no number as an empty text
    if isinstance(value, float) and value.is_integer() and control.step == 1:
        return int(value)
    return None if value == "" else value


def _make_control(name: str, field: FieldInfo, value: Any) -> Control:
    # what null means is in the description, which names it as the config files do
    info = (field.description or "").replace("null:", "Empty:").replace("null ", "empty ")
    inner = _without_none(field.annotation)
    if inner is bool:
        return Control(name, "check", info, value)
    if typing.get_origin(inner) is Literal:
        return Control(name, "choice", info, value, choices=typing.get_args(inner))
    whole = inner is int
    low, high = _limits(field.metadata, 1.0 if whole else _FINE)
    step = 1 if whole else _FINE
    if inner is not field.annotation or (name not in _ENDS and high is None):
        return Control(name, "number", info, value, low, high, step)
    ends = _ENDS.get(name, (0, 1))
    minimum = max(ends[0], low) if low is not None else ends[0]
    maximum = min(ends[1], high) if high is not None else ends[1]
    # a model's own choice may lie beyond what is usual
    return Control(name, "slider", info, value, min(minimum, value), max(maximum, value), step)


def _without_none(annotation: Any) -> Any:
    """``int`` of ``int | None``; other annotations as they are."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _limits(marks: Sequence[Any], least: float) -> tuple[float | None, float | None]:
    """The least and the largest value that a field may have; one that must be above a number begins at `least`."""
    low = high = None
    for mark in marks:
        if isinstance(mark, Ge):
            low = typing.cast("float", mark.ge)
        elif isinstance(mark, Gt):
            low = typing.cast("float", mark.gt) + least
        elif isinstance(mark, Le):
            high = typing.cast("float", mark.le)
    return low, high


def changed_options(options: GenerationOptions, own: GenerationOptions) -> Mapping[str, Any]:
    """The options that are not the model's own."""
    before = own.model_dump()
    return {name: value for name, value in options.model_dump().items() if value != before[name]}
