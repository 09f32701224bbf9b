"""Config: YAML and `a.b=c` overrides into frozen pydantic models, with errors that name the field and the remedy.

Each section is a small model that lives beside the code it configures; this file knows only how to read them.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Tag, ValidationError
from pydantic_core import ErrorDetails

from lory.runtime import UsageError


class Section(BaseModel):
    """Base of all config sections: frozen, unknown keys refused, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


S = TypeVar("S", bound=Section)

# pydantic puts the branch of a union between the keys; only real keys and positions are the user's
_UNION_TAG = re.compile(r"(str|int|float|bool|(list|dict|tuple|set|literal)\[.*\]|(function|tagged|constrained)-.*)$")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-4 is a number (YAML 1.1 wants 2.0e-4) and a key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key '{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """What it writes, `_Loader` reads back: the text '2e-4' is put in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}{at} is not valid YAML: {problem.rstrip('.')}.") from error
    except (ValueError, RecursionError) as error:
        # PyYAML lets these through, as for the date 2026-13-45
        raise UsageError(f"{where} is not valid YAML: {error}.") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text, as a config has to be.") from error
    except OSError as error:
        raise UsageError(f"Could not read {path}: {error.strerror}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}; a config is a mapping of sections.")
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` in which each override ``a.b=c`` has set `values["a"]["b"]`; `c` is read as YAML.

    A number in the path picks an element of a list (``data.train.0.sample=100``).
    """
    result = _copy(values)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"'{override}' was given; an override is section.field=value, as in train.epochs=5.")
        *parents, last = name.strip().split(".")
        place: Any = result
        for parent in parents:
            if isinstance(place, dict) and place.get(parent) is None:
                place[parent] = {}
            place = _step_into(place, parent, name)
        value = parse_yaml(text, f"The value of {name}")
        if isinstance(place, list):
            place[_index(place, last, name)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise UsageError(f"'{name}' was given, but {'.'.join(parents)} is a single value and has no fields.")
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _index(place: list[Any], key: str, name: str) -> int:
    if not place:
        raise UsageError(f"'{name}' was given, but that list is empty; give it whole, as in [a, b].")
    if not key.isdecimal() or int(key) >= len(place):
        raise UsageError(f"'{name}' was given; '{key}' should be a position from 0 to {len(place) - 1} in that list.")
    return int(key)


def _step_into(place: Any, key: str, name: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, name)]
    if isinstance(place, dict):
        return place[key]
    raise UsageError(f"'{name}' was given, but what stands before '.{key}' is a single value and has no fields.")


def build(model: type[S], values: Mapping[str, Any], where: str) -> S:
    """Validate `values` as a `model`.

    Raises:
        UsageError: one sentence for each problem, with the field, what was given and what is expected; an unknown key
            comes with the nearest known one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, detail) for detail in error.errors()]
        raise UsageError("\n".join(f"{where}: {problem}" for problem in problems)) from None


def _explain(model: type[BaseModel], detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"] if not _UNION_TAG.match(str(part))]
    name = ".".join(path)
    if detail["type"] == "extra_forbidden":
        tags = [str(part) for part in detail["loc"] if str(part).startswith("tagged-")]
        return f"unknown key '{name}'; {_suggest(model, path[:-1], path[-1], tags)}"
    if detail["type"] == "missing":
        return f"'{name}' is missing and has no default; add it."
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = detail["input"]
    shown = repr(given) if not isinstance(given, dict | list) else f"a {type(given).__name__}"
    return f"'{name}' was given {shown}: {message[:1].lower()}{message[1:].rstrip('.')}."


def _suggest(model: type[BaseModel], owner: list[str], key: str, tags: list[str]) -> str:
    section = _section_at(model, owner, tags)
    known = list(section.model_fields) if section else []
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean '{'.'.join([*owner, near[0]])}'?"
    # the right name in the wrong section is the other common slip
    elsewhere = [
        f"{name}.{key}"
        for name in model.model_fields
        if [name] != owner and (section := _section_at(model, [name])) and key in section.model_fields
    ]
    if elsewhere:
        return f"did you mean '{elsewhere[0]}'?"
    return f"known here: {', '.join(known)}."


def _section_at(model: type[BaseModel], path: list[str], tags: Sequence[str] = ()) -> type[BaseModel] | None:
    current: type[BaseModel] = model
    parts = iter(path)
    for part in parts:
        if part.isdigit():
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        inner = _find_section(field.annotation, tags)
        if inner is None:
            return None
        if typing.get_origin(field.annotation) is dict:
            next(parts, None)  # a key of the user's own
        current = inner
    return current


def _find_section(annotation: Any, tags: Sequence[str] = ()) -> type[BaseModel] | None:
    """The config section inside an annotation such as ``list[SourceConfig] | None``; of a tagged union, the tag's."""
    own = [mark.tag for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Tag)]
    if own and tags and not set(own) & set(tags):
        return None
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if found := _find_section(argument, tags):
            return found
    return None


def dump_yaml(section: BaseModel) -> str:
    """The section as YAML that `build` reads back to an equal section."""
    values = section.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
