"""Data sets on a hub: Hugging Face's or ModelScope's, read through `datasets`, which runs no code of theirs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lory.data.sources.download import fetch
from lory.data.sources.files import READERS, split_endings
from lory.data.sources.rows import Row, Rows
from lory.runtime import LoryError, UsageError, cache_folder, hash_file, lock_file, log, read_json, write_json

Hub = Literal["hf", "modelscope"]

MODELSCOPE_OWNERS = frozenset({"AI-ModelScope", "swift", "iic", "damo", "modelscope"})
"""Owners whose data sets are looked for on ModelScope unless `source` says otherwise."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BATCH_ROWS = 1000
_PAGE_FILES = 100
# readers of `datasets` that take nothing but data out of files; others unpickle or call programs
_READERS = frozenset({"json", "csv", "text", "parquet", "arrow", "imagefolder", "audiofolder", "videofolder", "cache"})


def looks_like_repo(path: str) -> bool:
    """Whether a path has the form owner/name."""
    return bool(_REPO.fullmatch(path)) and not _is_data(path)


def guess_hub(repo: str) -> Hub:
    """The hub that a data set is looked for on when nothing says so."""
    return "modelscope" if repo.partition("/")[0] in MODELSCOPE_OWNERS else "hf"


@dataclass(frozen=True)
class HubRows(Rows):
    """The rows of one split of a data set that `datasets` has opened."""

    name: str
    data: Any
    """A `Dataset`, or an `IterableDataset` that reads over the network as it goes."""
    length: int | None
    digest: str

    def read(self, start: int = 0) -> Iterator[Row]:
        data = self.data
        if hasattr(data, "to_iterable_dataset"):
            data = data.select(range(min(start, len(data)), len(data))).to_iterable_dataset()
        elif start:
            data = data.skip(start)
        row = start
        try:
            # media stay bytes and paths: they are opened when a model wants them
            for batch in data.decode(False).iter(batch_size=_BATCH_ROWS):
                for values in zip(*batch.values(), strict=True):
                    row += 1
                    yield f"{self.name} row {row}", dict(zip(batch, values, strict=True))
        except _hub_errors() as error:
            raise LoryError(f"{self.name} could not be read after row {row}: {_first_line(error)}.") from error

    def count(self) -> int:
        if self.length is None:
            raise UsageError(
                f"{self.name} does not say how many rows it has; with 'streaming', a split is cut by row numbers from "
                "the beginning, as in train[:1000]."
            )
        return self.length

    def fingerprint(self) -> str:
        return self.digest


def open_hub(
    repo: str,
    hub: Hub,
    subset: str | None = None,
    split: str = "",
    revision: str | None = None,
    streaming: bool = False,
    max_bytes: int | None = None,
    folder: str | None = None,
) -> HubRows:
    """One split of a data set on a hub.

    Args:
        split: its name; "" is train, or the only one there is.
        streaming: read over the network as rows are needed, keeping nothing; else it is downloaded once.
        max_bytes: the most that is downloaded from ModelScope.
        folder: a folder inside of the repository that holds the data files.

    Raises:
        UsageError: there is no such data set, subset, split or revision, or it cannot be reached.
    """
    if hub == "modelscope":
        local, digest = _fetch_modelscope(repo, revision or "master", max_bytes)
        # it would not notice that a file has changed
        options: dict[str, Any] = {"path": str(local), "cache_dir": str(local.parent / "arrow" / digest[:16])}
    else:
        options, digest = {"path": repo, "revision": revision}, ""
    datasets = _import_datasets()
    try:
        builder = datasets.load_dataset_builder(name=subset, data_dir=folder, **options)
        _check_reader(repo, builder)
        split = _choose_split(repo, builder, split)
        name = f"{repo}{f':{subset}' if subset else ''} {split}"
        if streaming:
            data = builder.as_streaming_dataset(split=split)
            known = (builder.info.splits or {}).get(split)
            length = known.num_examples if known else None
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split=split)
            length = len(data)
    except _hub_errors() as error:
        raise UsageError(_explain(repo, error)) from error
    # the builder's hash is the commit's on the hub
    parts = [digest or f"{repo}@{builder.hash}", subset, split, folder]
    return HubRows(name, data, length, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def _import_datasets() -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError("Data sets on a hub need the package 'datasets'; pip install datasets.") from error
    return datasets


def _hub_errors() -> tuple[type[Exception], ...]:
    import pyarrow
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

    return (OSError, ValueError, DatasetsError, pyarrow.ArrowException)


def _check_reader(repo: str, builder: Any) -> None:
    module = type(builder).__module__
    kind = module.rpartition(".")[2]
    if not module.startswith("datasets.packaged_modules.") or kind not in _READERS:
        raise UsageError(
            f"{repo} is kept in a form ({kind}) that is not read; known are {', '.join(sorted(_READERS - {'cache'}))}."
        )


def _choose_split(repo: str, builder: Any, split: str) -> str:
    names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    if not split:
        split = names[0] if len(names) == 1 else "train"
    if names and split not in names:
        raise UsageError(f"{repo} has no split '{split}'; it has {', '.join(names)}.")
    return split


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _explain(repo: str, error: Exception) -> str:
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError

    if config.HF_HUB_OFFLINE and isinstance(error, ConnectionError | FileNotFoundError):
        return (
            f"{repo} is no local file or folder, nor is it in the cache of 'datasets', and the hub is switched off "
            "(HF_HUB_OFFLINE); use it once online, or name a local copy."
        )
    if isinstance(error, DatasetNotFoundError):
        return f"{repo} was not found on {config.HF_ENDPOINT}: {_first_line(error)}; log in if it is private or gated."
    if isinstance(error, ConnectionError):
        return f"{repo} could not be reached on {config.HF_ENDPOINT}: {_first_line(error)}; check the network."
    return f"{repo} could not be opened: {_first_line(error)}."


# ModelScope: the files come over its HTTP API, and `datasets` reads them as a local folder.


def _fetch_modelscope(repo: str, revision: str, max_bytes: int | None) -> tuple[Path, str]:
    """The folder with the data files of a ModelScope repository, and a fingerprint of their contents."""
    base = cache_folder() / "modelscope" / repo.replace("/", "--") / urllib.parse.quote(revision, safe="")
    folder, manifest = base / "files", base / "files.json"
    address = f"{_modelscope_endpoint()}/api/v1/datasets/{repo}/repo"
    with lock_file(base.with_suffix(".lock"), wait=True):
        try:
            listed = _list_modelscope(repo, address, revision, base)
        except LoryError as error:
            if isinstance(error, UsageError) or not manifest.exists():
                raise
            log.info("%s The copy that was fetched earlier is used.", error)
            listed = read_json(manifest)
        else:
            _fetch_files(repo, address, revision, listed, folder, max_bytes)
            write_json(manifest, listed)
    contents = [hash_file(folder / file["Path"]) for file in listed]
    return folder, hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()


def _modelscope_endpoint() -> str:
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
    return (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")


def _modelscope_headers() -> Mapping[str, str]:
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}


def _list_modelscope(repo: str, address: str, revision: str, base: Path) -> list[dict[str, Any]]:
    """The repository's data files, each with Path, Size and Sha256."""
    files: list[dict[str, Any]] = []
    page: list[Any] = []
    for number in range(1, 10_000):
        query = {"Revision": revision, "Recursive": "True", "PageNumber": number, "PageSize": _PAGE_FILES}
        part = base / "tree.json"
        part.unlink(missing_ok=True)
        fetch(f"{address}/tree?{urllib.parse.urlencode(query)}", part, 2**28, _modelscope_headers())
        answer = read_json(part)
        data = answer.get("Data") if isinstance(answer, dict) else None
        if not isinstance(data, dict) or not answer.get("Success", True):
            why = answer.get("Message") if isinstance(answer, dict) else None
            raise UsageError(f"{repo} was not found on {_modelscope_endpoint()}: {why or 'no reason was given'}.")
        page = data.get("Files") or []
        files += [file for file in page if file.get("Type") != "tree" and _is_wanted(file["Path"])]
        if len(page) < _PAGE_FILES:
            break
    if not any(_is_data(file["Path"]) for file in files):
        raise UsageError(f"{repo} on ModelScope has no data files that are known; its data may need its own code.")
    if bad := [file["Path"] for file in files if not _is_inside(file["Path"])]:
        raise UsageError(f"{repo} lists the file '{bad[0]}', which would be written outside of its folder.")
    return files


def _is_data(path: str) -> bool:
    ending = split_endings(Path(path))[0]
    return bool(ending) and ending in READERS


def _is_wanted(path: str) -> bool:
    # the data card says which files are which subset and split
    return path == "README.md" or (_is_data(path) and PurePosixPath(path).name not in {"dataset_infos.json"})


def _is_inside(path: str) -> bool:
    place = PurePosixPath(path)
    return not place.is_absolute() and ".." not in place.parts and "\\" not in path and ":" not in path


def _fetch_files(
    repo: str, address: str, revision: str, files: list[dict[str, Any]], folder: Path, max_bytes: int | None
) -> None:
    total = sum(int(file.get("Size") or 0) for file in files)
    if max_bytes is not None and total > max_bytes:
        raise UsageError(f"{repo} has {total:,} bytes; raise the source's 'max_bytes' from {max_bytes:,} if wanted.")
    for file in files:
        target = folder / file["Path"]
        wanted = file.get("Sha256")
        if target.exists() and (hash_file(target) == wanted if wanted else target.stat().st_size == file.get("Size")):
            continue
        part = folder.parent / "parts" / hashlib.sha256(file["Path"].encode()).hexdigest()[:32]
        query = urllib.parse.urlencode({"Revision": revision, "FilePath": file["Path"]})
        fetch(f"{address}?{query}", part, max_bytes or 2**62, _modelscope_headers())
        if wanted and hash_file(part) != wanted:
            part.unlink()
            raise LoryError(f"{file['Path']} of {repo} came with other bytes than ModelScope lists; try again.")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
