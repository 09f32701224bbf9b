"""What every room stands on: errors, the log, files that are whole or absent, locks, and the machine's numbers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

log = logging.getLogger("lory")


class LoryError(Exception):
    """Something failed while running; the command line prints the sentence and exits with 1."""

    exit_code = 1


class UsageError(LoryError):
    """Wrong usage, config or data; the command line prints the sentence and exits with 2."""

    exit_code = 2


def cache_folder() -> Path:
    """Where lory keeps what it made once: ``$LORY_CACHE``, else ``$XDG_CACHE_HOME/lory``, else ``~/.cache/lory``."""
    if own := os.environ.get("LORY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lory"


def explain_os_error(error: OSError, doing: str) -> LoryError:
    """The one sentence for a failed write: what was being done, what the system said, what to do."""
    remedies: dict[int | None, str] = {
        errno.ENOSPC: "the disk is full; free some space or choose another folder",
        errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
        errno.EACCES: "permission denied; choose a folder you may write to",
        errno.EROFS: "the file system is read-only; choose another folder",
    }
    return LoryError(f"Could not {doing}: {remedies.get(error.errno, error.strerror or str(error))}.")


@contextlib.contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it to `target` when the block ends well, delete it when not.

    `target` must not exist by then, or be an empty folder. The files are flushed to the disk before the rename, so a
    power cut leaves either the whole folder or none.

    Raises:
        LoryError: the disk is full, or the place cannot be written to.
    """
    aside: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp makes the folder private; the result gets the permissions any new folder has
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        aside.chmod(0o777 & ~_umask())
        yield aside
        for path in [*sorted(aside.rglob("*")), aside]:
            flush(path)
        os.rename(aside, target)
        flush(target.parent)
    except OSError as error:
        raise explain_os_error(error, f"write {target}") from error
    except SafetensorError as error:
        # what safetensors makes of a full disk
        raise LoryError(f"Could not write {target}: {error}.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk now."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and keeps their entries without being asked
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: a reader sees the old text or the new, never a part."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise explain_os_error(error, f"write {path}") from error


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON with a closing newline; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file; a missing or broken one is a `UsageError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


@contextlib.contextmanager
def lock_file(path: Path, wait: bool, in_use: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path` while the block runs; the system frees it even when the process is killed.

    Args:
        wait: wait for the holder to finish; otherwise raise `UsageError` with the sentence `in_use`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if sys.platform == "win32":  # pragma: no cover
            import msvcrt

            def take() -> None:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

        else:
            import fcntl

            def take() -> None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

        try:
            take()
        except (BlockingIOError, PermissionError) as error:
            raise UsageError(in_use) from error
        yield  # closing the file releases the lock


def is_terminal() -> bool:
    """Whether a person is looking at standard output."""
    return sys.stdout.isatty()
