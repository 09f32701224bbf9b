"""What is written is whole or absent, failures are one sentence, and a lock dies with its process."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lory import runtime
from lory.runtime import (
    LoryError,
    UsageError,
    cache_folder,
    explain_os_error,
    hash_file,
    lock_file,
    read_json,
    write_aside,
    write_json,
    write_text,
)

FULL = "the disk is full; free some space or choose another folder."
as_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and permissions")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python on a script, waits for its first line, and ends it with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# Folders that are whole or absent


def test_a_folder_appears_with_all_its_files_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "checkpoint-3"
    with write_aside(target) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a.txt").write_text("a")
        assert aside.parent == target.parent  # a rename must not cross file systems
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), UsageError("no"), SystemExit(1)])
def test_nothing_is_left_when_the_block_fails(error: BaseException, tmp_path: Path) -> None:
    def write() -> None:
        with write_aside(tmp_path / "target") as aside:
            (aside / "a.txt").write_text("a")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_files_and_folders_are_flushed_before_the_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, events = tmp_path / "target", []
    flush, rename = runtime.flush, os.rename
    monkeypatch.setattr(runtime, "flush", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    with write_aside(target) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a.txt").write_text("a")
    assert sorted(events[:3]) == sorted([aside.name, "a.txt", "sub"])
    assert events[3:] == ["rename", tmp_path.name]


@posix
def test_a_kill_in_the_middle_leaves_only_a_hidden_folder(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    script = """
import sys, time
from pathlib import Path
from lory.runtime import write_aside
with write_aside(Path(sys.argv[1])) as aside:
    (aside / "a.txt").write_text("a")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = start(script, tmp_path / "checkpoint-3")
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".checkpoint-3.")
    assert left.suffix == ".tmp"
    with write_aside(tmp_path / "checkpoint-3"):  # and is in nobody's way
        pass
    assert (tmp_path / "checkpoint-3").is_dir()


def test_an_empty_folder_is_taken_and_a_full_one_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with write_aside(target) as aside:
        (aside / "a.txt").write_text("a")
    with pytest.raises(LoryError, match=r"^Could not write .*target: Directory not empty\.$"), write_aside(target):
        pass
    assert [path.name for path in target.iterdir()] == ["a.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_folders_place_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    with pytest.raises(LoryError, match="Could not write"), write_aside(target):
        pass
    assert target.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_new_folders_and_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual.txt").write_text("")
    with write_aside(tmp_path / "ours"):
        pass
    write_text(tmp_path / "ours.txt", "")
    for ours, usual in (("ours", "usual"), ("ours.txt", "usual.txt")):
        assert stat.S_IMODE((tmp_path / ours).stat().st_mode) == stat.S_IMODE((tmp_path / usual).stat().st_mode)


# Files that are old or new


def test_a_text_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("old, and longer", "你好\n🦜", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_one_text_or_the_other_and_never_a_part(tmp_path: Path) -> None:
    path, size = tmp_path / "a.txt", 200_000
    write_text(path, "0" * size)
    done = threading.Event()
    seen: set[tuple[int, int]] = set()

    def read() -> None:
        while not done.is_set():
            text = path.read_text()
            seen.add((len(text), len(set(text))))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write_text(path, str(number % 10) * size)
    done.set()
    reader.join()
    assert seen == {(size, 1)}


def test_what_cannot_be_written_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair: \ud83d")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoryError, match=r"^Could not write .*a.txt: No such file or directory\.$"):
        write_text(tmp_path / "none" / "a.txt", "a")


# A full disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_text_and_says_so(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, call, fail_with(errno.ENOSPC))
    with pytest.raises(LoryError) as caught:
        write_text(path, "new")
    assert str(caught.value) == f"Could not write {path}: {FULL}"
    assert caught.value.exit_code == 1
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_full_disk_leaves_no_folder_and_says_so(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, fail_with(errno.ENOSPC))
    with pytest.raises(LoryError) as caught, write_aside(tmp_path / "target") as aside:
        (aside / "a.txt").write_text("a")
    assert str(caught.value) == f"Could not write {tmp_path / 'target'}: {FULL}"
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_write_into_a_really_full_device_is_the_same_sentence(tmp_path: Path) -> None:
    def write() -> None:
        with write_aside(tmp_path / "target"), open("/dev/full", "w") as file:
            file.write("a" * 100_000)

    with pytest.raises(LoryError) as caught:
        write()
    assert str(caught.value) == f"Could not write {tmp_path / 'target'}: {FULL}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EDQUOT, "the disk quota is used up; free some space or choose another folder."),
        (errno.EACCES, "permission denied; choose a folder you may write to."),
        (errno.EROFS, "the file system is read-only; choose another folder."),
        (errno.EIO, f"{os.strerror(errno.EIO)}."),
    ],
)
def test_each_failure_has_its_sentence(number: int, remedy: str) -> None:
    assert str(explain_os_error(OSError(number, os.strerror(number)), "save it")) == f"Could not save it: {remedy}"


def test_an_error_without_a_number_is_told_in_its_own_words() -> None:
    assert str(explain_os_error(OSError("the cable is loose"), "save it")) == "Could not save it: the cable is loose."


@posix
@as_root
def test_a_folder_one_may_not_write_to_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for write in (lambda: write_text(tmp_path / "a", ""), lambda: write_aside(tmp_path / "b").__enter__()):
        with pytest.raises(LoryError, match="permission denied; choose a folder you may write to"):
            write()


# JSON and hashes


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "你好": {"🦜": "\n"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "你好" in text
    assert text.endswith("}\n")


def test_json_has_no_nan(tmp_path: Path) -> None:
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "a.json", [number])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1} x', b"\xff"])
def test_broken_json_is_a_usage_error_with_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} is not valid JSON: ")
    assert not str(caught.value).endswith("..")


def test_missing_json_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a.json does not exist\.$"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("version", [sys.version_info, (3, 10)], ids=["this Python", "Python 3.10"])
def test_a_hash_is_that_of_the_bytes(version: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    for content in (b"", b"a", os.urandom((1 << 20) + 7)):
        (tmp_path / "a").write_bytes(content)
        assert hash_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/lory")
    monkeypatch.delenv("LORY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/lory/.cache/lory")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/lory")
    monkeypatch.setenv("LORY_CACHE", "~/own")
    assert cache_folder() == Path("/home/lory/own")


# Locks

HOLDER = """
import sys, time
from pathlib import Path
from lory.runtime import lock_file
with lock_file(Path(sys.argv[1]), wait=False):
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_second_process_is_refused_with_the_sentence_given(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    start(HOLDER, tmp_path / "run" / "lock", 60)
    with (
        pytest.raises(UsageError, match=r"^The run is in use\.$"),
        lock_file(tmp_path / "run" / "lock", wait=False, in_use="The run is in use."),
    ):
        pass


@posix
def test_a_lock_dies_with_its_process(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start(HOLDER, tmp_path / "lock", 60)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    with lock_file(tmp_path / "lock", wait=False):
        pass


def test_who_waits_gets_the_lock_when_it_is_free(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    start(HOLDER, tmp_path / "lock", 0.5)
    begin = time.monotonic()
    with lock_file(tmp_path / "lock", wait=True):
        assert 0.3 < time.monotonic() - begin < 30


def test_a_lock_is_free_after_its_block_and_after_a_failure(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="inside"), lock_file(tmp_path / "lock", wait=False):
            raise ValueError("inside")


def test_a_lock_is_held_against_the_same_process_too(tmp_path: Path) -> None:
    with (
        lock_file(tmp_path / "lock", wait=False),
        pytest.raises(UsageError),
        lock_file(tmp_path / "lock", wait=False, in_use="taken"),
    ):
        pass


def test_exit_codes_tell_wrong_usage_from_failure() -> None:
    assert (LoryError("").exit_code, UsageError("").exit_code) == (1, 2)
    assert issubclass(UsageError, LoryError)
