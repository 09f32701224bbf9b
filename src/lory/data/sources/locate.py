"""What a source's path stands for: bundled records, files, a dataset_info.json, an address, or a data set on a hub."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.resources
import inspect
import json
import os
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lory.config import build
from lory.data.making.identity import identity_conversations
from lory.data.sources.compressed import DataFile
from lory.data.sources.config import BUNDLED, SourceConfig, is_function, is_there
from lory.data.sources.dataset_info import Entry, Rewriter, find_info, list_entries, read_entry
from lory.data.sources.download import download, is_url
from lory.data.sources.files import READERS, FileRows, describe_endings, explain_missing, open_files, split_endings
from lory.data.sources.hub import guess_hub, looks_like_repo, open_hub
from lory.data.sources.json_files import parse_lines
from lory.data.sources.registry import find, load_function, load_registry
from lory.data.sources.rows import BadRow, DroppedRow, JoinedRows, MadeRows, Row, Rows, combine_fingerprints
from lory.data.sources.sampling import SplitPart, parse_split
from lory.runtime import UsageError, hash_file


@dataclass(frozen=True)
class Origin:
    """Where a source's rows come from, and what that says about them beside the config."""

    rows: Rows
    short_name: str
    format: str = ""
    """The records' format, where the origin knows it."""
    sample: int | None = None
    """How many are to be drawn, if the config does not say."""
    rewrite: Callable[[dict[str, Any]], Any] | None = None
    """Turns each record into one of `format`, a `Conversation`, a `BadRow` or a `DroppedRow`."""
    mark: str = ""
    """SHA-256 of what else the records depend on, beside the content and the config as it was written."""


def resolve(config: SourceConfig) -> SourceConfig:
    """The config of a data set that the registry knows by name; what the source itself says comes over the entry."""
    if config.path in BUNDLED or is_there(config.path) or (entry := find(config.path)) is None:
        return config
    # by value, since the config in a run's folder has every field
    own = {
        name: value
        for name, field in SourceConfig.model_fields.items()
        if name not in ("path", "source")
        and (value := getattr(config, name)) != field.get_default(call_default_factory=True)
    }
    return build(SourceConfig, entry.source(config.source) | own, f"The data set '{config.path}'")


def locate(config: SourceConfig) -> Origin:
    """The rows that a source means.

    Raises:
        UsageError: there is nothing at its path, or not what the other fields ask for.
    """
    if config.path in BUNDLED:
        make = _open_identity if config.path == "identity" else _open_general
        return Origin(_cut(config, lambda part: _whole(make(config), part)), config.path)
    path = Path(config.path).expanduser()
    if info := _info_of(config, path):
        return _open_entry(config, info)
    origin = _locate_records(config, path)
    if is_function(config.format):
        rewrite, mark = _take_function(config.format)
        return replace(origin, format="messages", rewrite=rewrite, mark=mark)
    return origin


def _locate_records(config: SourceConfig, path: Path) -> Origin:
    if is_url(config.path):
        rows = _cut(config, lambda part: _whole(_open_url(config), part))
        return Origin(rows, Path(urllib.parse.urlsplit(config.path).path).name or config.path)
    if _is_local(config, path):
        return Origin(_cut(config, lambda part: _open_local(config, part)), path.name)
    repo = config.path
    return Origin(_cut(config, lambda part: _open_repo(config, repo, part.name)), repo)


def _is_local(config: SourceConfig, path: Path) -> bool:
    """Whether the path means something on this machine, be it there or not."""
    if config.source is not None:
        return False
    if is_there(config.path) or os.path.islink(path) or glob.has_magic(config.path) or not looks_like_repo(config.path):
        return True
    # owner/name, unless there is a folder of the owner's name: that is a slip, which should not go to the network
    return path.parent.is_dir()


def _info_of(config: SourceConfig, path: Path) -> Path | None:
    """The dataset_info.json that is meant; one beside a plain folder's files is not, unless they say so."""
    info = find_info(path)
    if config.dataset and not info:
        raise UsageError(f"{path} is no dataset_info.json, nor a folder with one, as 'dataset' needs.")
    if not config.dataset and info and (entries := list_entries(info)):
        raise UsageError(f"{info} describes data sets; name one with 'dataset': {', '.join(entries[:12])}.")
    return info if config.dataset else None


def _cut(config: SourceConfig, open_part: Callable[[SplitPart], Rows], default: str = "") -> Rows:
    """The rows of all parts of the split, one after the other."""
    parts = parse_split(config.split) if config.split else [SplitPart(default)]
    rows = [part.apply(open_part(part)) for part in parts]
    return rows[0] if len(rows) == 1 else JoinedRows(rows[0].name, rows)


def _whole(rows: Rows, part: SplitPart) -> Rows:
    """The rows of a source that has no split but train."""
    if part.name not in ("", "train"):
        raise UsageError(f"{rows.name} has no split '{part.name}'; it is one file, whose split is train.")
    return rows


def _open_identity(config: SourceConfig) -> Rows:
    @functools.cache
    def make() -> Sequence[Row]:
        assert config.name is not None  # the config's validators see to both
        assert config.author is not None
        return [
            (conversation.where, {"messages": [message.to_dict() for message in conversation.messages]})
            for conversation in identity_conversations(config.name, config.author)
        ]

    def digest() -> str:
        lines = json.dumps([record for _, record in make()], ensure_ascii=False)
        return hashlib.sha256(lines.encode()).hexdigest()

    return MadeRows("identity", make, digest)


def _open_general(config: SourceConfig) -> Rows:
    content = read_general()
    return MadeRows(
        "general",
        lambda: list(parse_lines("general", content.decode().split("\n"))),
        lambda: hashlib.sha256(content).hexdigest(),
    )


def read_general() -> bytes:
    """The bundled general records, as JSON lines."""
    return (importlib.resources.files("lory.data") / "texts" / "general.jsonl").read_bytes()


def _open_url(config: SourceConfig) -> Rows:
    fetched = download(config.path, config.max_bytes)
    for url in (config.path, fetched.url):
        ending, compression = split_endings(Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)))
        if ending and ending in READERS:
            file = DataFile(fetched.path, ending, compression, config.max_bytes, config.path)
            return FileRows(config.path, [file], "")
    raise UsageError(f"{config.path} does not end like a data file: {describe_endings()}; download it and name it so.")


def _open_local(config: SourceConfig, part: SplitPart) -> Rows:
    path = Path(config.path).expanduser()
    if not is_there(config.path) and not os.path.islink(path) and not glob.has_magic(config.path):
        also = f" For the data set {path} on a hub, set 'source'." if looks_like_repo(config.path) else ""
        raise UsageError(explain_missing(path, [*BUNDLED, *load_registry()]) + also)
    if not config.subset or (path / config.subset).is_dir() or "/" not in config.subset:
        return open_files(config.path, config.subset, part.name, config.max_bytes)
    parts = [open_files(config.path, subset, part.name, config.max_bytes) for subset in config.subset.split("/")]
    return JoinedRows(str(path), parts)


def _open_repo(config: SourceConfig, repo: str, split: str, folder: str | None = None) -> Rows:
    hub = config.source or guess_hub(repo)
    subsets = config.subset.split("/") if config.subset else [None]
    parts = [
        open_hub(repo, hub, subset, split, config.revision, config.streaming, config.max_bytes, folder)
        for subset in subsets
    ]
    return parts[0] if len(parts) == 1 else JoinedRows(repo, parts)


def _take_function(spec: str) -> tuple[Callable[[dict[str, Any]], Any], str]:
    """The user's function, and the SHA-256 of the file that names it, with that of the file that it is in."""
    function = load_function(spec)
    inner = inspect.unwrap(function)
    files = {
        sys.modules[spec.partition(":")[0]].__file__,
        inspect.getsourcefile(inner) if inspect.isfunction(inner) else None,
    }
    dropped = DroppedRow(f"left out by {spec}")

    def rewrite(record: dict[str, Any]) -> Any:
        try:
            result = function(record)
        except Exception as error:  # noqa: BLE001 - a user's own code may raise whatever it likes
            return BadRow(f"made {spec} fail ({type(error).__name__}: {error})")
        return dropped if result is None else result

    return rewrite, combine_fingerprints(sorted(hash_file(Path(file)) for file in files if file))


def _open_entry(config: SourceConfig, info: Path) -> Origin:
    """A data set of a dataset_info.json: its file if that is there, else from the hub that it names."""
    assert config.dataset is not None
    entry = read_entry(info, config.dataset)
    rewrite = Rewriter(entry)
    rows = _cut(config, lambda part: _open_entry_part(config, info, entry, part), entry.split)
    return Origin(rows, config.dataset, rewrite.format, entry.num_samples, rewrite, entry.fingerprint())


def _open_entry_part(config: SourceConfig, info: Path, entry: Entry, part: SplitPart) -> Rows:
    config = config.model_copy(update={"subset": config.subset or entry.subset})
    path = info.parent / entry.file_name if entry.file_name else None
    if path and (path.exists() or not (entry.hf_hub_url or entry.ms_hub_url)):
        if not path.exists():
            raise UsageError(f"{info}: the file of '{config.dataset}', {path}, does not exist.")
        split = part.name if config.split else ""
        return replace(open_files(str(path), None, split, config.max_bytes), folder=str(info.parent))
    hub = config.source or ("hf" if entry.hf_hub_url else "modelscope")
    repo = entry.hf_hub_url if hub == "hf" else entry.ms_hub_url
    if not repo:
        raise UsageError(f"{info}: '{config.dataset}' is not on {hub}; leave 'source' out.")
    return _open_repo(config.model_copy(update={"source": hub}), repo, part.name, entry.folder)
