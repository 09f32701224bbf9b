"""Tables: CSV and TSV, Parquet, Arrow files and streams. A row becomes an object of what JSON knows (and bytes)."""

from __future__ import annotations

import csv
import datetime
import decimal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lory.data.sources.compressed import DataFile
from lory.data.sources.rows import BadRow, Row
from lory.runtime import UsageError

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 1024
_LONGEST_CELL = 2**30
_ARROW_MARK = b"ARROW1"
_OLD_FEATHER_MARK = b"FEA1"


def read_csv(file: DataFile, start: int = 0) -> Iterator[Row]:
    """Comma-separated values under a header."""
    return _read_delimited(file, ",", start)


def read_tsv(file: DataFile, start: int = 0) -> Iterator[Row]:
    """Tab-separated values under a header."""
    return _read_delimited(file, "\t", start)


def _read_delimited(file: DataFile, delimiter: str, start: int) -> Iterator[Row]:
    # the module's limit of 131,072 characters is for the whole process; a long document is an ordinary cell here
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    row = end = 0
    with file.open_text(newline="") as text:
        # strict: a quote that is never closed would swallow the rest of the file
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise UsageError(f"{file} line 1: the header has the column '{twice[0]}' twice; rename one.")
            end = reader.line_num
            for cells in reader:
                begin, end = end + 1, reader.line_num
                if not cells:
                    continue
                row += 1
                if row <= start:
                    continue
                where = f"{file} row {row} (line {begin})"
                if len(cells) == len(header):
                    yield where, dict(zip(header, cells, strict=True))
                else:
                    yield where, BadRow(f"has {len(cells)} cells, but the header has {len(header)}")
        except csv.Error as error:
            raise UsageError(
                f"{file} line {end + 1} begins a broken row: {error}; look for a quote that is never closed."
            ) from error


def read_parquet(file: DataFile, start: int = 0) -> Iterator[Row]:
    """The rows of a Parquet file; groups of rows before `start` are passed over unread."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    with file.open_seekable() as source:
        try:
            with pyarrow.parquet.ParquetFile(source) as table:
                groups = list(range(table.num_row_groups))
                while groups and row + table.metadata.row_group(groups[0]).num_rows <= start:
                    row += table.metadata.row_group(groups.pop(0)).num_rows
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups) if groups else ():
                    yield from _number(batch, file, row, start)
                    row += batch.num_rows
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is no readable Parquet file after row {row}: {_first_line(error)}.") from error


def count_parquet(file: DataFile) -> int:
    """The number of rows in the file's own words."""
    import pyarrow
    import pyarrow.parquet

    with file.open_seekable() as source:
        try:
            return pyarrow.parquet.ParquetFile(source).metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{file} is no readable Parquet file: {_first_line(error)}.") from error


def read_arrow(file: DataFile, start: int = 0) -> Iterator[Row]:
    """The rows of an Arrow file (also called Feather) or Arrow stream."""
    import pyarrow

    row = 0
    with file.open_seekable() as source:
        mark = source.read(len(_ARROW_MARK))
        source.seek(0)
        if mark.startswith(_OLD_FEATHER_MARK):
            raise UsageError(f"{file} is of Feather's first version, which is no Arrow; write it as version 2.")
        try:
            for batch in _arrow_batches(source, file, is_file=mark == _ARROW_MARK):
                if row + batch.num_rows > start:
                    # offsets that point outside of the data would crash the process
                    batch.validate(full=True)
                    yield from _number(batch, file, row, start)
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is no readable Arrow file after row {row}: {_first_line(error)}.") from error


def _arrow_batches(source: Any, file: DataFile, is_file: bool) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    # mapped, a file of any size takes no memory of its own
    data = source if file.compression else pyarrow.memory_map(str(file.path))
    try:
        if is_file:
            with pyarrow.ipc.open_file(data) as reader:
                for number in range(reader.num_record_batches):
                    yield from _cut(reader.get_batch(number))
        else:
            with pyarrow.ipc.open_stream(data) as reader:
                for batch in reader:
                    yield from _cut(batch)
    finally:
        if data is not source:
            data.close()


def _cut(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    for begin in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(begin, _BATCH_ROWS)


def count_arrow(file: DataFile) -> int:
    """How many rows there are, from the heads of the batches."""
    import pyarrow

    with file.open_seekable() as source:
        mark = source.read(len(_ARROW_MARK))
        source.seek(0)
        try:
            return sum(batch.num_rows for batch in _arrow_batches(source, file, is_file=mark == _ARROW_MARK))
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{file} is no readable Arrow file: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _number(batch: pyarrow.RecordBatch, file: DataFile, before: int, start: int) -> Iterator[Row]:
    """The rows of a batch that has `before` rows before it, without those before row `start` of the file."""
    skip = min(max(start - before, 0), batch.num_rows)
    for number, record in enumerate(_to_records(batch.slice(skip), str(file)), before + skip + 1):
        yield f"{file} row {number}", record


def _to_records(batch: pyarrow.RecordBatch, name: str) -> list[dict[str, Any]]:
    """The rows of a batch as objects of text, numbers, bytes, lists and objects."""
    if twice := [column for column, count in Counter(batch.schema.names).items() if count > 1]:
        raise UsageError(f"{name} has the column '{twice[0]}' twice; rename one.")
    records = batch.to_pylist(maps_as_pydicts="lossy")
    odd = [field.name for field in batch.schema if not _is_plain(field.type)]
    for record in records if odd else ():
        for column in odd:
            record[column] = _to_plain(record[column], f"{name}: the column '{column}'")
    return records


def _is_plain(kind: pyarrow.DataType) -> bool:
    """Whether pyarrow gives what JSON knows (or bytes) for the type."""
    import pyarrow.types as types

    if types.is_nested(kind):
        return all(_is_plain(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _is_plain(kind.value_type)
    return not (types.is_temporal(kind) or types.is_decimal(kind) or types.is_float16(kind))


def _to_plain(value: Any, what: str) -> Any:
    """Dates and times as ISO 8601 text, decimals as numbers; a duration is refused."""
    if value is None or isinstance(value, str | int | bytes):
        return value
    if isinstance(value, list):
        return [_to_plain(item, what) for item in value]
    if isinstance(value, dict):
        return {key: _to_plain(item, what) for key, item in value.items()}
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    for kind, convert in _CONVERSIONS.items():
        if isinstance(value, kind):
            return convert(value)
    raise UsageError(f"{what} holds a {type(value).__name__}, which is no text, number or list; convert it first.")


_CONVERSIONS: dict[type, Callable[[Any], Any]] = {
    datetime.date: lambda value: value.isoformat(),  # a datetime is a date, too
    datetime.time: lambda value: value.isoformat(),
    float: float,
}
