"""A path, a folder or a pattern stands for its data files, each once and in order; what cannot be read is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lory.data.sources.files import open_files
from lory.runtime import UsageError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *numbers: int) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers), encoding="utf-8")


def read(path: str, start: int = 0, **fields: Any) -> list[int]:
    return [value["n"] for _, value in open_files(path, **fields).read(start)]


def error_of(path: str, **fields: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(path, **fields)
    return str(caught.value)


def make_tree() -> None:
    write("d/b.jsonl", 3, 4, 5)
    write("d/a.ndjson", 1, 2)
    write("d/deep/er/c.json", 6)
    Path("d/deep/er/c.json").write_text('[{"n": 6}]')
    pq.write_table(pa.table({"n": [7, 8]}), "d/deep/z.parquet")
    Path("d/x.jsonl.gz").write_bytes(gzip.compress(b'{"n": 9}\n'))
    Path("d/y.csv.bz2").write_bytes(bz2.compress(b"n\n10\n"))
    for other in ("README.md", "dataset_info.json", "dataset_infos.json", ".hidden.jsonl", ".git/a.jsonl", "LICENSE"):
        Path("d", other).parent.mkdir(exist_ok=True)
        Path("d", other).write_text('{"not": "data"}')


def test_a_folder_is_all_its_data_files_in_order() -> None:
    make_tree()
    assert read("d") == [1, 2, 3, 4, 5, 6, 7, 8, 9, "10"]
    assert open_files("d").count() == 10


@pytest.mark.parametrize("start", range(12))
def test_reading_a_folder_may_start_anywhere(start: int) -> None:
    make_tree()
    assert read("d", start) == [1, 2, 3, 4, 5, 6, 7, 8, 9, "10"][start:]


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("d/*.jsonl", [3, 4, 5]),
        ("d/[ab].*", [1, 2, 3, 4, 5]),
        ("d/**/*.json*", [3, 4, 5, 6, 9]),
        ("d/deep/**", [6, 7, 8]),
    ],
)
def test_a_pattern_is_what_it_matches(pattern: str, numbers: list[int]) -> None:
    make_tree()
    for info in ("dataset_info.json", "dataset_infos.json"):
        Path("d", info).unlink()
    assert read(pattern) == numbers


def test_a_file_wins_over_a_pattern() -> None:
    write("a[1].jsonl", 1)
    write("a1.jsonl", 2)
    assert read("a[1].jsonl") == [1]
    assert read("a[0-9].jsonl") == [2]


def test_a_pattern_without_data_is_refused() -> None:
    make_tree()
    assert error_of("d/*.tsv").startswith("d/*.tsv matches no file")
    assert error_of("d/*.md").startswith("d/*.md matches only 'README.md'")
    assert "matches d/README.md, too, which is no data file" in error_of("d/[a-zA-Z]*.*")


def test_a_folder_without_data_is_refused() -> None:
    Path("empty/sub").mkdir(parents=True)
    assert error_of("empty").startswith("empty is a folder without any data file; one ends in .json")


def test_links_are_followed_but_not_in_circles() -> None:
    make_tree()
    Path("d/again").symlink_to("..")
    Path("d/b2.jsonl").symlink_to("b.jsonl")
    assert sorted(map(int, read("d"))) == list(range(1, 11))
    assert read("d/**/b*.jsonl") == [3, 4, 5]
    Path("loop.jsonl").symlink_to("loop.jsonl")
    assert error_of("loop.jsonl") == "loop.jsonl could not be read: Too many levels of symbolic links."


def test_a_split_takes_the_files_of_its_name() -> None:
    for name in ("train-00001", "train-00000", "test", "sub/train"):
        write(f"d/{name}.jsonl", len(name))
    assert read("d", split="train") == [9, 11, 11]
    assert read("d", split="test") == [4]
    assert read("d/*.jsonl", split="test") == [4]
    assert "has no file for the split 'dev'; its files are" in error_of("d", split="dev")
    write("only.jsonl", 1)
    assert read("only.jsonl", split="train") == [1]
    assert "only.jsonl has no file for the split 'test'" in error_of("only.jsonl", split="test")
    # the folder's own name says nothing
    write("test/a.jsonl", 2)
    assert read("test", split="train") == [2]


def test_a_subset_is_a_folder_inside() -> None:
    write("d/en/a.jsonl", 1)
    write("d/zh/a.jsonl", 2)
    assert read("d", subset="zh") == [2]
    assert error_of("d", subset="fr") == "d has no folder 'fr' for the subset; its folders are 'en', 'zh'."
    assert "has no folder '..'" in error_of("d/en", subset="..")
    assert "is no folder, so it has no subset" in error_of("d/en/a.jsonl", subset="x")


def test_the_fingerprint_is_of_the_content_alone() -> None:
    write("a.jsonl", 1)
    write("b.jsonl", 1)
    write("one/x.jsonl", 1)
    write("one/y.jsonl", 2)
    write("two/a.jsonl", 1)
    write("two/b.jsonl", 2)
    write("turned/a.jsonl", 2)
    write("turned/b.jsonl", 1)
    assert open_files("a.jsonl").fingerprint() == open_files("b.jsonl").fingerprint()
    assert open_files("one").fingerprint() == open_files("two").fingerprint()
    # a slice takes other rows then
    assert open_files("one").fingerprint() != open_files("turned").fingerprint()
    assert open_files("one").fingerprint() != open_files("one/x.jsonl").fingerprint()


def test_what_is_no_file_is_refused() -> None:
    assert error_of("/dev/zero") == "/dev/zero is no regular file, but a pipe or a device; a data file is expected."
    os.mkfifo("pipe.jsonl")
    assert error_of("pipe.jsonl").startswith("pipe.jsonl is no regular file")
    with pytest.raises(UsageError, match="no regular file"):
        open_files("pipe.jsonl").fingerprint()
    assert error_of("a.jsonl/b.jsonl").startswith("a.jsonl/b.jsonl does not exist")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_refused() -> None:
    write("a.jsonl", 1)
    Path("a.jsonl").chmod(0)
    assert error_of("a.jsonl") == "a.jsonl could not be read: Permission denied."


def test_a_failing_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", 1)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    assert error_of("a.jsonl") == "a.jsonl could not be read: Permission denied."


def test_utf_16_is_read() -> None:
    Path("a.jsonl").write_bytes('{"n": "你好"}\n{"n": 2}\n'.encode("utf-16"))
    assert read("a.jsonl") == ["你好", 2]
    Path("a.jsonl").write_bytes('{"n": 1}\n'.encode("utf-16")[:-1])
    assert "begins with the mark of UTF-16" in error_of("a.jsonl")


def test_the_names_say_how_the_same_bytes_are_read() -> None:
    for name in ("d/a.jsonl", "e/a.ndjson", "f/a.txt"):
        write(name, 1)
    lines, also_lines, text = (open_files(folder) for folder in "def")
    assert lines.fingerprint() == text.fingerprint()
    assert lines.reading == also_lines.reading != text.reading
