"""Local files: what a path, a folder or a pattern stands for, and the rows in it."""

from __future__ import annotations

import difflib
import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lory.data.sources.compressed import MAX_BYTES, OPENERS, DataFile
from lory.data.sources.json_files import count_lines, read_json, read_jsonl
from lory.data.sources.rows import Row, Rows, combine_fingerprints
from lory.data.sources.table_files import count_arrow, count_parquet, read_arrow, read_csv, read_parquet, read_tsv
from lory.runtime import LoryError, UsageError, hash_file

Reader = Callable[[DataFile, int], Iterator[Row]]

ABOUT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files in a folder that tell about the data; no records are looked for in them."""


def read_txt(file: DataFile, start: int = 0) -> Iterator[Row]:
    """One document a line; blank lines part nothing."""
    with file.open_text(newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            if start:
                start -= 1
                continue
            yield f"{file} line {number}", {"text": line.removesuffix("\n").removesuffix("\r")}


READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": read_txt,
    "": read_json,  # a file without an ending, such as ./identity
}

_COUNTERS: dict[str, Callable[[DataFile], int]] = {
    ".jsonl": count_lines,
    ".ndjson": count_lines,
    ".txt": count_lines,
    ".parquet": count_parquet,
    ".arrow": count_arrow,
    ".feather": count_arrow,
}
"""Where counting is much quicker than reading."""


@dataclass(frozen=True)
class FileRows(Rows):
    """The rows of files, one file after the other."""

    name: str
    files: Sequence[DataFile]
    folder: str = ""

    @property
    def reading(self) -> str:  # type: ignore[override]
        return "+".join(READERS[file.ending].__name__ for file in self.files)

    def read(self, start: int = 0) -> Iterator[Row]:
        for file in self.files:
            # skipping inside of a file is left to its reader; to pass it over, its length is needed
            if start and len(self.files) > 1 and start >= (count := _count(file)):
                start -= count
                continue
            yield from _read_file(file, start)
            start = 0

    def count(self) -> int:
        return sum(_count(file) for file in self.files)

    def fingerprint(self) -> str:
        try:
            return combine_fingerprints([hash_file(file.path) for file in self.files])
        except OSError as error:
            raise explain_unreadable(error, self.name) from error


def _read_file(file: DataFile, start: int) -> Iterator[Row]:
    try:
        state = file.path.stat()
        if stat.S_ISREG(state.st_mode) and state.st_size == 0:
            raise UsageError(f"{file} is empty; at least one record is expected.")
        yield from READERS[file.ending](file, start)
    except UnicodeDecodeError as error:
        raise _explain_undecodable(file, error) from error
    except OSError as error:
        raise explain_unreadable(error, str(file)) from error


def _count(file: DataFile) -> int:
    if counter := _COUNTERS.get(file.ending):
        try:
            return counter(file)
        except UnicodeDecodeError as error:
            raise _explain_undecodable(file, error) from error
        except OSError as error:
            raise explain_unreadable(error, str(file)) from error
    return sum(1 for _ in _read_file(file, 0))


def explain_unreadable(error: OSError, name: str) -> UsageError:
    """The sentence for a file or folder that the system would not read."""
    return UsageError(f"{name} could not be read: {error.strerror or error}.")


def _explain_undecodable(file: DataFile, error: UnicodeDecodeError) -> UsageError:
    if error.encoding.replace("-", "") not in ("utf8", "utf8sig"):
        return UsageError(f"{file} begins with the mark of {error.encoding.upper()}, but is broken; save it as UTF-8.")
    return UsageError(f"{file} line {_find_undecodable(file)} is not UTF-8; save the file as UTF-8.")


def _find_undecodable(file: DataFile) -> int:
    """The number of the first line that is not UTF-8; a text file's decoder knows only its own block."""
    with file.open_bytes() as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise LoryError(f"{file} changed while it was read; try again.")


def open_files(path: str, subset: str | None = None, split: str = "", max_bytes: int = MAX_BYTES) -> FileRows:
    """The rows of a path: of the file, of those in the folder (at any depth), or of those that a pattern matches.

    Args:
        subset: a folder inside of the folder.
        split: takes the files that have this word in their name or in that of a folder; a single file without any
            such word is the split "train".

    Raises:
        UsageError: there is none, or it is no data file.
    """
    base = Path(os.path.expanduser(path))
    if subset:
        base = _enter_subset(base, subset)
    kind = _kind_of(base)
    if kind is None and glob.has_magic(path):
        found = _match(base)
        start = str(base)[: min(str(base).index(mark) for mark in "*?[" if mark in str(base))]
    elif kind is None:
        raise UsageError(explain_missing(base))
    elif stat.S_ISDIR(kind):
        found, start = _walk(base), str(base)
        if not found:
            raise UsageError(f"{base} is a folder without any data file; one ends in {describe_endings()}.")
    else:
        if not stat.S_ISREG(kind):
            raise UsageError(f"{base} is no regular file, but a pipe or a device; a data file is expected.")
        found, start = [_as_data_file(base)], str(base.parent)
    files = [DataFile(path, *split_endings(path), max_bytes) for path in found]
    chosen = _choose_split(files, split, start, str(base)) if split else files
    return FileRows(str(base), chosen, start if os.path.isdir(start) else os.path.dirname(start))


def _enter_subset(base: Path, subset: str) -> Path:
    if not base.is_dir():
        raise UsageError(f"{base} is no folder, so it has no subset '{subset}'; leave 'subset' out.")
    if not (inside := base / subset).is_dir() or base.resolve() not in inside.resolve().parents:
        folders = sorted(item.name for item in base.iterdir() if item.is_dir() and not item.name.startswith("."))
        raise UsageError(f"{base} has no folder '{subset}' for the subset; its folders are {_list(folders)}.")
    return inside


def _kind_of(path: Path) -> int | None:
    """The file's mode; None if there is no such file."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise explain_unreadable(error, str(path)) from error


def _match(pattern: Path) -> list[Path]:
    paths = [Path(found) for found in glob.glob(str(pattern), recursive=True)]
    files = [path for path in paths if path.is_file()]
    known = [path for path in files if split_endings(path)[0] in READERS]
    if not known:
        what = f"only {_list([path.name for path in files])}" if files else "no file"
        raise UsageError(f"{pattern} matches {what}; a data file ends in {describe_endings()}.")
    if other := [path for path in files if path not in known]:
        raise UsageError(
            f"{pattern} matches {other[0]}, too, which is no data file ({describe_endings()}); narrow the pattern."
        )
    return _once(known)


def _walk(folder: Path) -> list[Path]:
    """The data files in a folder at any depth, in the order of their paths; hidden ones are left out."""
    found: list[Path] = []
    entered: set[str] = set()

    def fail(error: OSError) -> None:
        raise explain_unreadable(error, str(error.filename))

    # links to folders are followed, but no folder is entered twice: a link may lead back up
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(place, name) for name in names if not name.startswith(".") and name not in ABOUT_DATA)
        found += [path for path in paths if path.is_file() and split_endings(path)[0] in set(READERS) - {""}]
    return _once(found)


def _once(paths: Iterable[Path]) -> list[Path]:
    """The paths in order, each file once, however many links lead to it."""
    return list({os.path.realpath(path): path for path in sorted(paths, reverse=True)}.values())[::-1]


def split_endings(path: Path) -> tuple[str, str]:
    """The ending that tells the kind, and that of the compression, in lower case."""
    ending = path.suffix.lower()
    if ending in OPENERS:
        return path.with_suffix("").suffix.lower(), ending
    return ending, ""


def _as_data_file(path: Path) -> Path:
    if (ending := split_endings(path)[0]) not in READERS:
        raise UsageError(f"{path} ends in '{ending}'; a data file ends in {describe_endings()}.")
    return path


def _choose_split(files: list[DataFile], split: str, start: str, name: str) -> list[DataFile]:
    def words(file: DataFile) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", str(file.path)[len(start) :].lower()))

    chosen = [file for file in files if split.lower() in words(file)]
    if chosen:
        return chosen
    if split == "train" and not any({"test", "validation", "valid", "dev", "eval"} & words(file) for file in files):
        return files
    raise UsageError(
        f"{name} has no file for the split '{split}'; its files are {_list([f.path.name for f in files])}."
    )


def explain_missing(path: Path, also: Sequence[str] = ()) -> str:
    """The sentence for a path that is not there, with the nearest name in its folder or among `also`."""
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}; relative paths start at {Path.cwd()}."
    names = [item.name for item in path.parent.iterdir()] + (list(also) if path.parent == Path() else [])
    near = difflib.get_close_matches(path.name, names, n=1)
    remedy = f"did you mean '{path.parent / near[0]}'?" if near else f"relative paths start at {Path.cwd()}."
    return f"{path} does not exist; {remedy}"


def describe_endings() -> str:
    """The known endings, as a list for sentences."""
    return f"{', '.join(ending for ending in READERS if ending)}, each also compressed ({', '.join(OPENERS)})"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
