"""JSON of any length is read piece by piece, whatever piece ends where, and a mistake is found on its line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lory.data.sources import json_files
from lory.data.sources.compressed import DataFile
from lory.data.sources.json_files import count_lines, read_json, read_jsonl
from lory.runtime import UsageError

RECORDS: list[Any] = [
    {"query": 'a "quoted"\n\\text', "response": "你好 🌅", "n": [1, 2.5e-3, -7, True, None]},
    {"query": "", "response": {"deep": [{"er": "😀"}]}},
    {"query": "x" * 50, "response": "12345678901234567890"},
]


def write(folder: Path, text: str, name: str = "a.json") -> DataFile:
    (folder / name).write_bytes(text.encode())
    return DataFile(folder / name, Path(name).suffix)


def values(file: DataFile, start: int = 0) -> list[Any]:
    return [value for _, value in read_json(file, start)]


def error_of(file: DataFile) -> str:
    with pytest.raises(UsageError) as caught:
        values(file)
    return str(caught.value).removeprefix(f"{file} ")


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 16, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii", [True, False])
def test_records_are_whole_wherever_a_piece_ends(
    chunk: int, indent: int | None, ascii: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", chunk)
    array = json.dumps(RECORDS, indent=indent, ensure_ascii=ascii)
    assert values(write(tmp_path, array)) == RECORDS
    assert values(write(tmp_path, f' \r\n{{"version": 123456, "data" :{array}, "more": [1.5]}}\n ')) == RECORDS
    lines = "\n\n".join(json.dumps(record, ensure_ascii=ascii) for record in RECORDS)
    assert values(write(tmp_path, lines)) == RECORDS
    assert values(write(tmp_path, json.dumps(RECORDS[0]))) == RECORDS[:1]


def test_places_are_lines_or_numbers(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(RECORDS))
    assert [where for where, _ in read_json(file)] == [f"{file} record {number}" for number in (1, 2, 3)]
    lines = write(tmp_path, "\n".join(json.dumps(record) for record in RECORDS), "b.json")
    assert [where for where, _ in read_json(lines, 1)] == [f"{lines} line 2", f"{lines} line 3"]


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_reading_may_start_anywhere(start: int, tmp_path: Path) -> None:
    assert values(write(tmp_path, json.dumps(RECORDS)), start) == RECORDS[start:]
    file = write(tmp_path, "\n".join(["", *(json.dumps(record) for record in RECORDS), ""]), "a.jsonl")
    assert [value for _, value in read_jsonl(file, start)] == RECORDS[start:]
    assert count_lines(file) == 3


WRONG = [
    ('[{"a": 1},\n{"a": 2}', "line 2 is not valid JSON: Expecting ',' delimiter"),
    ('[{"a": 1},\n{"a": "2', "line 2 is not valid JSON: Unterminated string"),
    ('[{"a": 1},\n{"a": 2},\n]', "line 3 is not valid JSON"),
    ('[{"a": 1}\n{"a": 2}]', "line 2 is not valid JSON: Expecting ',' delimiter"),
    ('[{"a": 1}]\n[{"a": 2}]', "line 2 is not valid JSON: Extra data"),
    ('[{"a": 1},\n\n{"a": tru}]', "line 3 is not valid JSON: Expecting value"),
    ('[{"a": 1},\n{"a": "\\x"}]', "line 2 is not valid JSON: Invalid \\escape"),
    ('[{"a": 1},\n{"a": "\x00"}]', "line 2 is not valid JSON: Invalid control character"),
    ('{"data": [{"a": 1},\n{"a": 2}', "line 2 is not valid JSON: Expecting ',' delimiter"),
    ('{"data": [{"a": 1}],\nversion: 1}', "line 2 is not valid JSON"),
    ("[", "line 1 is not valid JSON: Expecting value"),
    ("nonsense", "line 1 is not valid JSON: Expecting value"),
    ("[" * 100_000, "line 1 is not usable JSON: maximum recursion depth"),
]


@pytest.mark.parametrize("chunk", [1, 8, 1 << 20])
@pytest.mark.parametrize(("text", "problem"), WRONG)
def test_a_mistake_is_found_on_its_line(
    text: str, problem: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", chunk)
    assert problem in error_of(write(tmp_path, text))


def test_a_mistake_is_found_without_reading_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", 1000)
    file = write(tmp_path, '[{"a": 1},\n{"a" 2},\n' + '{"a": 3},' * 100_000)
    tracemalloc.start()
    assert error_of(file).startswith("line 2 is not valid JSON: Expecting ':' delimiter")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.path.stat().st_size / 4


@pytest.mark.parametrize("form", ["array", "data", "lines"])
def test_a_long_file_takes_little_memory(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", 1 << 14)
    record = json.dumps({"query": "q" * 100, "response": "r" * 900})
    joined = ("\n" if form == "lines" else ",").join([record] * 8000)
    text = {"array": f"[{joined}]", "data": f'{{"data": [{joined}]}}', "lines": joined}[form]
    file = write(tmp_path, text, "a.jsonl" if form == "lines" else "a.json")
    reader = read_jsonl if form == "lines" else read_json
    tracemalloc.start()
    assert sum(1 for _ in reader(file)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(text) / 20


def test_a_record_that_is_longer_than_a_piece_may_have_any_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", 64)
    long = {"messages": [{"role": "user", "content": "x" * 500}]}
    assert values(write(tmp_path, json.dumps(long))) == [long]
    file = write(tmp_path, "\n".join([json.dumps(long)] * 2))
    assert [where for where, _ in read_json(file)] == [f"{file} line 1", f"{file} line 2"]
    assert error_of(write(tmp_path, json.dumps({"a": "x" * 500}))).startswith("holds one object, neither a record")
