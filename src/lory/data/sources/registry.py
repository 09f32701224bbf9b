"""The registry: data sets by name, bundled ones and a user's own, and a user's own functions that read records."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lory.config import Section, build, parse_yaml, read_yaml
from lory.data.records.formats import FORMATS
from lory.runtime import UsageError

ENVIRONMENT = "LORY_REGISTRY"
"""Names a user's own registry files, parted as in PATH."""

_BUNDLED = "registry.yaml"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class RegistryEntry(Section):
    """A data set by name: where it is, and how its records are read."""

    description: str = Field(min_length=1, description="what it is, in one line")
    hf: str | None = Field(None, description="owner/name on Hugging Face")
    modelscope: str | None = Field(None, description="owner/name on ModelScope")
    path: str | None = Field(
        None, description="in a registry of one's own: a file, folder, pattern or address; relative to the registry"
    )
    subset: str | None = Field(None, min_length=1, description="the subset that is read; null: the only one")
    subsets: list[str] = Field(default=[], description="the subsets that there are")
    split: str = Field("train", min_length=1, description="the split that is read")
    splits: list[str] = Field(default=["train"], min_length=1, description="the splits that there are")
    revision: str | None = Field(None, min_length=1, description="branch, tag or commit")
    format: str = Field("auto", description="the records' format, or `module:function` in a registry of one's own")
    columns: dict[str, str] = Field(
        default_factory=dict, description="{name that the format expects: name in the data set}, where they differ"
    )
    question: str | None = Field(None, min_length=1, description="what is asked about each image of image_text records")
    tags: list[str] = Field(default=[], description="what to find it by")
    license: str | None = Field(None, description="the licence that its page names")

    @field_validator("hf", "modelscope")
    @classmethod
    def _check_id(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise ValueError("owner/name is expected")
        return value

    @field_validator("format")
    @classmethod
    def _check_format(cls, format: str) -> str:
        if format in ("auto", *FORMATS) or _FUNCTION.fullmatch(format):
            return format
        near = difflib.get_close_matches(format, ["auto", *FORMATS], n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(f"{hint}known formats are auto, {', '.join(FORMATS)}, and one's own as module:function")

    @model_validator(mode="after")
    def _check_together(self) -> RegistryEntry:
        if not (self.hf or self.modelscope or self.path):
            raise ValueError("it says nowhere where the data set is; give hf, modelscope or path")
        if self.path and (self.hf or self.modelscope):
            raise ValueError("both a path and a hub are given; use one of them")
        if self.subsets and self.subset not in self.subsets:
            raise ValueError(f"the subset is {self.subset}, which is not among {', '.join(self.subsets)}")
        if self.format in FORMATS and (unknown := set(self.columns) - set(FORMATS[self.format].keys)):
            known = ", ".join(FORMATS[self.format].keys)
            raise ValueError(f"the format {self.format} expects no '{min(unknown)}' in columns; known: {known}")
        return self

    def source(self, hub: Literal["hf", "modelscope"] | None = None) -> dict[str, Any]:
        """The fields of a source's config that read this data set; what a user writes beside its name comes over them.

        Args:
            hub: where to fetch it; None: Hugging Face, or ModelScope where it is only there.

        Raises:
            UsageError: it is not on that hub.
        """
        values: dict[str, Any] = {"format": self.format, "columns": self.columns, "question": self.question}
        if self.path is None:
            hub = hub or ("hf" if self.hf else "modelscope")
            if not (repo := getattr(self, hub)):
                raise UsageError(
                    f"It is not known where this data set is on {hub}; it is '{self.hf or self.modelscope}'."
                )
            values |= {"source": hub, "path": repo, "split": self.split}
        else:
            values |= {"path": self.path} | ({"split": self.split} if self.split != "train" else {})
        # where it is on both hubs, the revision is one of Hugging Face
        revision = None if hub == "modelscope" and self.hf else self.revision
        values |= {"subset": self.subset, "revision": revision}
        return {key: value for key, value in values.items() if value}


def find(name: str, paths: Sequence[Path] = ()) -> RegistryEntry | None:
    """The data set of that name, or None; see `load_registry`."""
    return load_registry(paths).get(name) if _NAME.fullmatch(name) else None


def load_registry(paths: Sequence[Path] = ()) -> dict[str, RegistryEntry]:
    """All data sets by name: the bundled ones, then those of a user's own files, of which a later one wins.

    A user's own are ``$XDG_CONFIG_HOME/lory/registry.yaml`` (else ``~/.config/lory/registry.yaml``) if it is there,
    the files that ``$LORY_REGISTRY`` names, and `paths`.

    Raises:
        UsageError: a file is missing or no registry; the sentence names file and entry.
    """
    entries = dict(_load_bundled())
    for path in [*_own_files(), *paths]:
        entries |= _load_file(path.expanduser())
    return entries


def _own_files() -> list[Path]:
    usual = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lory" / _BUNDLED
    named = [Path(name) for name in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if name]
    return [*([usual] if usual.is_file() else []), *named]


@functools.cache
def _load_bundled() -> dict[str, RegistryEntry]:
    text = resources.files("lory.data").joinpath(_BUNDLED).read_text("utf-8")
    return {name: build(RegistryEntry, values, name) for name, values in parse_yaml(text, _BUNDLED).items()}


def _load_file(path: Path) -> dict[str, RegistryEntry]:
    entries = {}
    for name, values in read_yaml(path).items():
        where = f"{path}, entry '{name}'"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                f"{where}: a name has letters, digits, '.', '-' and '_', and begins with one of the first two."
            )
        if not isinstance(values, dict):
            raise UsageError(f"{where} is no mapping of fields, such as {{description: ..., hf: owner/name}}.")
        entry = build(RegistryEntry, values, where)
        if entry.path and "://" not in entry.path:
            entry = entry.model_copy(update={"path": str(path.parent / Path(entry.path).expanduser())})
        entries[name] = entry
    return entries


def describe_registry(pattern: str = "", paths: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The data sets that a pattern finds in their names, tags or descriptions, each as one row of plain values.

    Args:
        pattern: a part of a word in any case, or a pattern with * and ? for the name alone; empty: all.
    """
    wanted = pattern.lower()
    rows = []
    for name, entry in load_registry(paths).items():
        if "*" in wanted or "?" in wanted:
            found = fnmatchcase(name.lower(), wanted)
        else:
            found = wanted in " ".join([name, entry.description, *entry.tags]).lower()
        if found:
            values = entry.model_dump(include={"description", "hf", "modelscope", "path", "tags", "license"})
            rows.append({"name": name, **values})
    return rows


def load_function(spec: str) -> Callable[[dict[str, Any]], Any]:
    """The function that ``module:function`` names; the module is looked for in the working directory first.

    It is given a record and returns what it means: a dict in the form of the format `messages`, a `Conversation`, or
    None to leave it out. It is the user's own code: only configs and registries of the user's may name one.

    Raises:
        UsageError: there is no such module or function, or the module cannot be imported.
    """
    if not _FUNCTION.fullmatch(spec):
        raise UsageError(f"'{spec}' names no function; module:function is expected, as in my_data:read_record.")
    name, _, attribute = spec.partition(":")
    try:
        with _import_from(Path.cwd()):
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            file = f"{name.replace('.', '/')}.py"
            raise UsageError(f"'{spec}': there is no {file} in {Path.cwd()}, and no module {name}.") from error
        raise UsageError(f"'{spec}': the module {name} needs {error.name}, which is not installed.") from error
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"'{spec}': the module {name} could not be imported: {error}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, functions, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"its functions are {', '.join(functions) or 'none'}."
        raise UsageError(f"'{spec}': {module.__file__ or name} has no function '{attribute}'; {hint}")
    return function


@contextlib.contextmanager
def _import_from(folder: Path) -> Iterator[None]:
    """Look for modules in `folder` first while the block runs; an installed command does not."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
