"""Arrow files that are written a batch of rows at a time, and read through a memory map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.runtime import explain_os_error

if TYPE_CHECKING:
    import pyarrow


class Table:
    """An Arrow file that grows row by row; all of its batches but the last have the same number of rows."""

    def __init__(self, path: Path, schema: pyarrow.Schema, batch_rows: int) -> None:
        import pyarrow

        self.path, self.schema, self.batch_rows = path, schema, batch_rows
        self._sink = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_file(self._sink, schema)
        self._rows: list[tuple[Any, ...]] = []

    def append(self, row: tuple[Any, ...]) -> None:
        """Add a row, a value for each field."""
        self._rows.append(row)
        if len(self._rows) == self.batch_rows:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        columns = [
            _to_array(values, kind)
            for values, kind in zip(zip(*self._rows, strict=True), self.schema.types, strict=True)
        ]
        self._rows = []
        try:
            self._writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))
        except OSError as error:
            raise explain_os_error(error, f"write {self.path}") from error

    def close(self) -> None:
        """Write what is left; closing twice does nothing."""
        if self._sink.closed:
            return
        try:
            self._flush()
            self._writer.close()
        except OSError as error:
            raise explain_os_error(error, f"write {self.path}") from error
        finally:
            self._sink.close()


def _to_array(values: Sequence[Any], kind: pyarrow.DataType) -> pyarrow.Array:
    import numpy as np
    import pyarrow

    if not pyarrow.types.is_list(kind):
        return pyarrow.array(values, kind)
    # several times as fast as letting Arrow look at every number
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.fromiter(itertools.chain.from_iterable(values), kind.value_type.to_pandas_dtype(), int(ends[-1]))
    return pyarrow.ListArray.from_arrays(ends, flat)


def read_table(path: Path) -> pyarrow.RecordBatchFileReader:
    """A finished file, mapped into memory."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
