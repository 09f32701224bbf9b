"""The cache of encoded data: found again by what went into it, whatever the file is called."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lory.data.encoding.encode import Encoder
from lory.data.encoding.pictures import ImageRules
from lory.data.encoding.store import SUMMARY, Store, Summary, Writer
from lory.data.encoding.workers import encode_all
from lory.data.sources.read import SourceConfig, SourceReader, open_source
from lory.runtime import LoryError, cache_folder, lock_file, log, write_aside

# Raise it when reading, conversion or encoding change, so that old stores are not used
_VERSION = 3
_MOST_BYTES = 20 * 2**30
"""When the cache holds more, the stores that were not used for the longest time are deleted."""
_DAY = 24 * 3600
_MOST_TOLD = 20
"""How many broken images are told of one by one in data.json."""


def encode_source(config: SourceConfig, encoder: Encoder, use_cache: bool, workers: int | None) -> Store:
    """A source's records, read, converted and encoded; taken from the cache when nothing has changed.

    Args:
        use_cache: keep the result for later runs; otherwise it goes when the process ends.
        workers: processes that encode (see `lory.data.encoding.workers.encode_all`).

    Raises:
        UsageError: bad data; the sentence names file and line.
    """
    reader = open_source(config)
    encoder = encoder.with_rules(find_rules([reader], encoder.rules))
    if not use_cache:
        return _encode_for_now(config, reader, encoder, workers)
    key = _find_key(config, reader, encoder)
    folder = cache_folder() / "data" / key
    if (store := _find_stored(folder, config)) is not None:
        return store
    if not _can_write(folder.parent):
        log.warning(
            "%s cannot be written to, so encoded data are not kept; name another folder in LORY_CACHE, or set "
            "data.cache to false.",
            folder.parent,
        )
        return _encode_for_now(config, reader, encoder, workers)
    # the processes of one run, and runs side by side, would all encode the same; a lock a key would leave many files
    with lock_file(cache_folder() / "locks" / f"data-{key[:2]}.lock", wait=True):
        if (store := _find_stored(folder, config)) is not None:
            return store
        shutil.rmtree(folder, ignore_errors=True)
        with _take_place(folder) as aside:
            _encode_into(aside, config, reader, encoder, workers)
        _prune(folder)
        return Store(folder, config.path)


def find_rules(readers: Sequence[SourceReader], rules: ImageRules) -> ImageRules:
    """Which images the records of these sources may name."""
    roots = dict.fromkeys(Path(reader.media_root or ".") for reader in readers)
    drops = all(reader.config.on_bad == "drop" for reader in readers)
    return replace(rules, roots=tuple(roots), on_bad="drop" if drops else "error")


def _find_stored(folder: Path, config: SourceConfig) -> Store | None:
    if not (folder / SUMMARY).exists():
        return None
    with contextlib.suppress(LoryError):  # a damaged one is made anew
        store = Store(folder, config.path)
        if not store.images.is_current():
            return None
        with contextlib.suppress(OSError):  # somebody else's cache may be read, but not marked as used
            os.utime(folder)
        return store
    return None


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _encode_for_now(config: SourceConfig, reader: SourceReader, encoder: Encoder, workers: int | None) -> Store:
    folder = _temporary_folder()
    _encode_into(folder, config, reader, encoder, workers)
    return Store(folder, config.path)


def _encode_into(
    folder: Path, config: SourceConfig, reader: SourceReader, encoder: Encoder, workers: int | None
) -> None:
    with Writer(folder, config.path) as writer:
        encode_all(reader, encoder, writer, workers)
        notes = [*reader.notes, *list_notes(encoder.notes)]
        dropped = Counter(reader.dropped) + writer.dropped
        writer.finish(Summary(reader.read, dropped, notes, reader.fingerprint, hash_tokenizer(encoder)))


def list_notes(notes: Counter[str]) -> list[str]:
    """An encoder's notes as sentences."""
    counted = [f"{what}: {count}" for what, count in notes.items() if not what.endswith(".")]
    # whole sentences are about one record each
    told = [what for what in notes if what.endswith(".")]
    more = [f"and {len(told) - _MOST_TOLD} more"] if len(told) > _MOST_TOLD else []
    return [*counted, *told[:_MOST_TOLD], *more]


@contextlib.contextmanager
def _take_place(folder: Path) -> Iterator[Path]:
    """`write_aside`, but a store that another run finished meanwhile is as good."""
    try:
        with write_aside(folder) as aside:
            yield aside
    except LoryError:
        if not (folder / SUMMARY).exists():
            raise


def _temporary_folder() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="lory-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _find_key(config: SourceConfig, reader: SourceReader, encoder: Encoder) -> str:
    """A hash of all that the samples depend on: content, how it is read, template, tokenizer and rules."""
    parts: dict[str, Any] = {
        "version": [_VERSION, _find_version()],
        "content": reader.fingerprint,
        "reading": reader.reading,
        # a file's name is not among what is learnt
        "source": config.model_dump(mode="json", exclude={"path", "weight"}),
        "tokenizer": hash_tokenizer(encoder),
        "terminators": encoder.terminators,
        "rules": [encoder.max_tokens, encoder.on_long, encoder.loss_on],
    }
    if encoder.reader is not None:
        # texts are the same wherever they lie, but images are found from where they lie
        parts["images"] = [encoder.reader.describe(), os.path.abspath(reader.media_root or ".")]
        parts["limits"] = str(encoder.rules.limits)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _find_version() -> str:
    try:
        return version("lory-llm")
    except PackageNotFoundError:
        return ""


def hash_tokenizer(encoder: Encoder) -> str:
    """SHA-256 of the whole tokenizer: vocabulary, merges, special tokens, settings and chat template."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [type(tokenizer).__name__, whole, str(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def _prune(newest: Path) -> None:
    """Keep the cache below its limit."""
    found: list[tuple[float, Path, int]] = []
    for folder in newest.parent.iterdir():
        with contextlib.suppress(OSError):  # another run may delete it meanwhile
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            found.append((folder.stat().st_mtime, folder, size))
    total = sum(size for _, _, size in found)
    for used, folder, size in sorted(found):
        if total <= _MOST_BYTES or folder == newest:
            break
        # what another run is writing; what a killed one left goes after a day
        if folder.name.startswith(".") and time.time() - used < _DAY:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        total -= size
        log.info("Deleted %s from the cache of encoded data, which is above its limit.", folder)
