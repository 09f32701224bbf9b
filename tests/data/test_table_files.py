"""Rows of tables become objects of text, numbers, lists and objects; a broken table is refused with its place."""

from __future__ import annotations

import csv
import datetime
import decimal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from lory.data.sources.compressed import DataFile
from lory.data.sources.files import READERS
from lory.data.sources.rows import BadRow
from lory.data.sources.table_files import count_arrow, count_parquet, read_arrow, read_csv, read_parquet
from lory.runtime import UsageError

ROWS: list[dict[str, Any]] = [{"query": f"q{n}", "response": f"a{n}", "n": n} for n in range(3000)]


def write_ipc(path: Path, table: pa.Table, stream: bool = False) -> None:
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)


WRITERS: dict[str, Callable[[Path, pa.Table], None]] = {
    "a.parquet": lambda path, table: pq.write_table(table, path, row_group_size=1300),
    "a.arrow": write_ipc,
    "stream.arrow": lambda path, table: write_ipc(path, table, stream=True),
    "a.feather": lambda path, table: pa.feather.write_feather(table, path, compression="zstd"),
}


def make(folder: Path, name: str, table: pa.Table) -> DataFile:
    path = folder / name
    WRITERS[name](path, table)
    return DataFile(path, path.suffix)


def read(file: DataFile, start: int = 0) -> list[Any]:
    return [value for _, value in READERS[file.ending](file, start)]


def error_of(file: DataFile) -> str:
    with pytest.raises(UsageError) as caught:
        read(file)
    return str(caught.value).removeprefix(str(file)).strip()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("start", [0, 1, 1023, 1024, 1300, 2600, 2999, 3000, 5000])
def test_reading_may_start_anywhere(name: str, start: int, tmp_path: Path) -> None:
    file = make(tmp_path, name, pa.Table.from_pylist(ROWS))
    rows = list(READERS[file.ending](file, start))
    assert [value for _, value in rows] == ROWS[start:]
    assert [where for where, _ in rows[:1]] == [f"{file} row {start + 1}"][: len(rows)]
    assert (count_parquet if name == "a.parquet" else count_arrow)(file) == 3000


DAY = datetime.datetime(2026, 1, 2, 3, 4, 5)
KINDS: list[tuple[pa.Array, list[Any]]] = [
    (pa.array([{"role": "user", "parts": [{"t": "x"}]}]), [{"role": "user", "parts": [{"t": "x"}]}]),
    (pa.array([[("a", 1), ("b", 2)]], pa.map_(pa.string(), pa.int64())), [{"a": 1, "b": 2}]),
    (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
    (pa.array([DAY], pa.timestamp("ms", "UTC")), ["2026-01-02T03:04:05+00:00"]),
    (pa.array([[{"at": DAY}]]), [[{"at": "2026-01-02T03:04:05"}]]),
    (pa.array([DAY.date()]), ["2026-01-02"]),
    (pa.array([DAY.time()]), ["03:04:05"]),
    (pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00"), None]), [1.5, 2, None]),
    (pa.array([b"\x00\xff"]), [b"\x00\xff"]),
    (pa.array([None, None]), [None, None]),
    (pa.array(["x"], pa.large_string()), ["x"]),
    (pa.array([1.5], pa.float16()), [1.5]),
]


@pytest.mark.parametrize(("column", "values"), KINDS, ids=lambda kind: str(getattr(kind, "type", "")))
def test_values_are_what_json_knows(column: pa.Array, values: list[Any], tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        rows = read(make(tmp_path, name, pa.table({"x": column})))
        assert [row["x"] for row in rows] == values
        assert [type(row["x"]) for row in rows] == [type(value) for value in values]


def test_a_duration_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([datetime.timedelta(1)])})
    assert "the column 'x' holds a timedelta" in error_of(make(tmp_path, "a.arrow", table))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_cut_off_file_is_refused(name: str, keep: float, tmp_path: Path) -> None:
    file = make(tmp_path, name, pa.Table.from_pylist(ROWS))
    data = file.path.read_bytes()
    file.path.write_bytes(data[: int(len(data) * keep)])
    assert error_of(file).startswith(("is no readable Parquet file after row", "is no readable Arrow file after row"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_wrong_footer_is_refused(name: str, tmp_path: Path) -> None:
    file = make(tmp_path, name, pa.Table.from_pylist(ROWS))
    data = bytearray(file.path.read_bytes())
    data[-12:-6] = b"\xff\xff\xff\x7f\xff\xff"
    file.path.write_bytes(data)
    assert error_of(file).startswith("is no readable")


def test_offsets_that_point_outside_of_the_data_are_refused(tmp_path: Path) -> None:
    file = make(tmp_path, "a.arrow", pa.table({"text": ["abc", "def"]}))
    data = file.path.read_bytes()
    offsets, wrong = struct.pack("<3i", 0, 3, 6), struct.pack("<3i", 0, 2_000_000, 6)
    assert data.count(offsets) == 1
    file.path.write_bytes(data.replace(offsets, wrong))
    assert error_of(file).startswith("is no readable Arrow file after row 0")


def test_the_first_feather_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1....FEA1")
    assert "Feather's first version" in error_of(DataFile(tmp_path / "a.feather", ".feather"))


def test_equal_columns_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    assert "has the column 'text' twice" in error_of(make(tmp_path, "a.arrow", table))


def write_csv(folder: Path, text: str | bytes) -> DataFile:
    (folder / "a.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return DataFile(folder / "a.csv", ".csv")


def test_a_ragged_row_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    file = write_csv(tmp_path, 'a,b\n1,2\n\n"x\ny"\n3,4\n5,6,7\n')
    assert list(read_csv(file)) == [
        (f"{file} row 1 (line 2)", {"a": "1", "b": "2"}),
        (f"{file} row 2 (line 4)", BadRow("has 1 cells, but the header has 2")),
        (f"{file} row 3 (line 6)", {"a": "3", "b": "4"}),
        (f"{file} row 4 (line 7)", BadRow("has 3 cells, but the header has 2")),
    ]
    assert [where for where, _ in read_csv(file, 2)] == [f"{file} row 3 (line 6)", f"{file} row 4 (line 7)"]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    limit = csv.field_size_limit(131_072)
    try:
        assert read(write_csv(tmp_path, f"a,b\n{'x' * 2_000_000},y\n"))[0]["a"] == "x" * 2_000_000
    finally:
        csv.field_size_limit(limit)


def test_columns_may_have_any_name(tmp_path: Path) -> None:
    assert read(write_csv(tmp_path, "class,import,,self\n1,2,3,4\n")) == [
        {"class": "1", "import": "2", "": "3", "self": "4"}
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('a,b\n1,"2\n3,4\n', "line 2 begins a broken row"),
        ("a,a\n1,2\n", "line 1: the header has the column 'a' twice"),
    ],
)
def test_a_broken_csv_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    assert error_of(write_csv(tmp_path, text)).startswith(problem)


def test_readers_are_the_tables_own() -> None:
    assert READERS[".parquet"] is read_parquet
    assert READERS[".feather"] is READERS[".arrow"] is read_arrow
