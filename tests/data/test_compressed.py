"""A compressed file gives the same text as a plain one; a broken one, a bomb and what is no file are refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from lory.data.sources import compressed
from lory.data.sources.compressed import DataFile
from lory.runtime import UsageError

TEXT = "".join(f'{{"text": "line {n} 你好"}}\n' for n in range(500))

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def pack(folder: Path, ending: str, data: bytes, **fields: int) -> DataFile:
    path = folder / f"a.jsonl{ending}"
    path.write_bytes(PACKERS[ending](data))
    return DataFile(path, ".jsonl", ending, **fields)


def read(file: DataFile) -> str:
    with file.open_text("\n") as text:
        return text.read()


def error_of(file: DataFile) -> str:
    with pytest.raises(UsageError) as caught:
        read(file)
    return str(caught.value)


@pytest.mark.parametrize("ending", PACKERS)
def test_what_was_packed_comes_out(ending: str, tmp_path: Path) -> None:
    file = pack(tmp_path, ending, TEXT.encode())
    assert read(file) == TEXT
    with file.open_seekable() as seekable:
        seekable.seek(-2, os.SEEK_END)
        assert seekable.read() == b"}\n"


@pytest.mark.parametrize("ending", PACKERS)
def test_files_packed_one_after_the_other_are_read_to_the_end(ending: str, tmp_path: Path) -> None:
    file = pack(tmp_path, ending, TEXT.encode())
    file.path.write_bytes(file.path.read_bytes() * 2)
    assert read(file) == TEXT * 2


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"not packed at all", lambda data: data[:3]])
def test_a_broken_file_is_refused(ending: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = pack(tmp_path, ending, os.urandom(3000).hex().encode())
    file.path.write_bytes(damage(file.path.read_bytes()))
    assert error_of(file).startswith(f"{file.path} is broken or cut off after")


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    file = pack(tmp_path, ".gz", os.urandom(3000).hex().encode())
    data = bytearray(file.path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.path.write_bytes(data)
    assert "is broken or cut off" in error_of(file)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_bomb_is_refused_long_before_it_is_unpacked(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "FREE_BYTES", 2**20)
    file = pack(tmp_path, ending, b"0" * 2**25)
    message = error_of(file)
    assert "unpacks to more than 300 times its size" in message
    assert "unpack it yourself if you trust it" in message


def test_a_small_file_of_equal_records_is_no_bomb(tmp_path: Path) -> None:
    file = pack(tmp_path, ".gz", b"0" * 2**20)
    assert file.path.stat().st_size * compressed.MAX_RATIO < 2**20
    assert len(read(file)) == 2**20


def test_the_size_is_limited(tmp_path: Path) -> None:
    file = pack(tmp_path, ".gz", TEXT.encode(), max_bytes=1000)
    assert "unpacks to more than 1,000 bytes; raise the source's 'max_bytes'" in error_of(file)
    with pytest.raises(UsageError, match="max_bytes"), file.open_seekable():
        pass


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    assert read(DataFile(path, ".txt")) == TEXT


def test_utf_16_without_a_mark_is_named(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
        assert "it may be UTF-16 without a mark" in error_of(DataFile(tmp_path / "a.txt", ".txt"))


@pytest.mark.parametrize("ending", PACKERS)
def test_a_compressed_file_under_a_plain_name_is_named(ending: str, tmp_path: Path) -> None:
    file = pack(tmp_path, ending, TEXT.encode())
    assert f"rename it to {file.path}{ending}" in error_of(DataFile(file.path, ".jsonl"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", Path("/dev/zero")):
        assert f"{path} is no regular file" in error_of(DataFile(path, ".jsonl"))


def test_a_stream_that_cannot_be_inflated_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 50)
    assert "is broken" in error_of(DataFile(tmp_path / "a.gz", ".jsonl", ".gz"))
