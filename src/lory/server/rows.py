"""The keys and values of the answers that are decoded together: rows that join and leave while the others go on.

Rows are aligned at their ends, so a step writes one column for all of them, as in a batch padded on the left. What is
held is larger than what is used, by rows and by columns; `keys` and `values` of the layers are views of the used part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lory.runtime import LoryError

# Columns that are held ahead at least
_ROOM = 128

KeysValues = Sequence[tuple[Tensor, Tensor]]
"""For each layer keys and values of one row, (heads, T, head_dim) each."""


@dataclass
class _Span:
    """The used part of what all layers hold: `rows` from the first, columns from `begin` up to `end`."""

    rows: int = 0
    begin: int = 0
    end: int = 0


class RowsLayer(DynamicLayer):
    """One layer's keys and values, (rows, heads, columns, head_dim) as held."""

    def __init__(self, span: _Span, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.span = span
        self.lazy_initialization(keys, values)
        self.held = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the next token's keys and values (rows, heads, 1, head_dim); returns those of all tokens."""
        span, (keys, values) = self.span, self.held
        if key_states.shape[2] != 1 or len(key_states) != span.rows:
            raise LoryError(f"{tuple(key_states.shape)} was given to a step; one token of each row is expected.")
        keys[: span.rows, :, span.end], values[: span.rows, :, span.end] = key_states[:, :, 0], value_states[:, :, 0]
        used = slice(0, span.rows), slice(None), slice(span.begin, span.end + 1)
        return keys[used], values[used]

    def get_seq_length(self) -> int:
        """Columns in use, the step's own not yet among them."""
        return self.span.end - self.span.begin


class RowsCache(Cache):
    """The cache of the rows that are decoded together; see the module."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[RowsLayer] = []
        self.span = _Span()
        self.lengths: list[int] = []
        """Tokens of each row."""

    def join(self, states: KeysValues) -> None:
        """Add a row that has these keys and values."""
        length = states[0][0].shape[1]
        self._make_room(states, self.span.rows + 1, length)
        columns = slice(self.span.end - length, self.span.end)
        for layer, new in zip(self.layers, states, strict=True):
            for held, own in zip(layer.held, new, strict=True):
                held[self.span.rows, :, columns] = own
        self.span.rows += 1
        self.lengths.append(length)
        self._fit()

    def leave(self, row: int) -> None:
        """Take a row out; the last one takes its place."""
        last = self.span.rows - 1
        if row != last:
            columns = slice(self.span.end - self.lengths[last], self.span.end)
            for layer in self.layers:
                for held in layer.held:
                    held[row, :, columns] = held[last, :, columns]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.span.rows = last
        self._fit()

    def read(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of a row's keys and values."""
        columns = slice(self.span.end - self.lengths[row], self.span.end)
        return [(keys[row, :, columns].clone(), values[row, :, columns].clone()) for keys, values in self._pairs()]

    def begin_step(self) -> Tensor | None:
        """Make room for one token of each row; which tokens it sees, (rows, columns + 1) bool, None: all of them."""
        if self.span.end == self.layers[0].held[0].shape[2]:
            self._move(self.layers[0].held[0].shape[0])
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        device = self.layers[0].held[0].device
        padding = torch.tensor([longest - length for length in self.lengths], device=device)
        return torch.arange(longest + 1, device=device) >= padding[:, None]

    def end_step(self) -> None:
        """The step's token of each row is there."""
        self.span.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [layer.held for layer in self.layers]

    def _fit(self) -> None:
        if not self.lengths:
            # an idle server holds nothing
            self.layers, self.span = [], _Span()
            return
        self.span.begin = self.span.end - max(self.lengths)

    def _make_room(self, states: KeysValues, rows: int, length: int) -> None:
        """Hold `rows` rows, and at least `length` columns up to the end."""
        if not self.layers:
            self.span.end = length
            for keys, values in states:
                shapes = [(rows, len(own), length + _ROOM, own.shape[2]) for own in (keys, values)]
                # zeros, since what is masked still must be a number
                held = keys.new_zeros(shapes[0]), values.new_zeros(shapes[1])
                self.layers.append(RowsLayer(self.span, *held))
        elif rows > (there := len(self.layers[0].held[0])) or length > self.span.end:
            self._move(max(2 * there, rows) if rows > there else there, length)

    def _move(self, rows: int, length: int = 0) -> None:
        """Hold the used part anew, with room for `rows` rows and for `length` columns before the end."""
        used = self.span.end - self.span.begin
        end = max(length, used)
        for layer in self.layers:
            layer.held = tuple(self._copy(held, rows, end) for held in layer.held)
        self.span.begin, self.span.end = end - used, end

    def _copy(self, held: Tensor, rows: int, end: int) -> Tensor:
        span = self.span
        used = held[: span.rows, :, span.begin : span.end]
        # twice what is used, so that moving costs little for each token
        new = held.new_zeros((rows, held.shape[1], end + max(_ROOM, end), held.shape[3]))
        new[: span.rows, :, end - used.shape[2] : end] = used
        return new
