"""A data set of formula pictures with their LaTeX: three Parquet files and a card, the same whatever draws them."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lory.data.formula_grammar import LEVELS, SIDES, Formula, LevelName, Side, draw_formulas, vocabulary
from lory.data.formula_images import Style, render
from lory.runtime import LoryError, UsageError, write_aside, write_text

SPLITS: dict[Side, str] = {"train": "train", "validation": "validation", "test": "test"}
_HELD_OUT = 0.05
"""Share of the formulas for validation, and for the test."""
_CHUNK = 32
"""Formulas that are drawn together by one process."""
_WORTH_PROCESSES = 8 * _CHUNK
_SCHEMA = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())])
_FEATURES = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a data set is made by; equal recipes give equal files."""

    count: int
    level: LevelName = "medium"
    style: Style = "print"
    seed: int = 0
    spaced: bool = True
    """Spaces between all tokens of the text, as im2latex has them; otherwise only where LaTeX needs them."""


@dataclass
class Made:
    """Counts of a finished data set."""

    rows: dict[Side, int]
    tokens: int = 0
    longest: int = 0
    """Tokens of the longest formula."""
    image_bytes: int = 0


def count_sides(count: int) -> dict[Side, int]:
    """How many of `count` formulas each side gets: 5% for validation and for the test, at least one each."""
    if count < len(SIDES):
        raise UsageError(f"{count} formulas were asked for; give at least {len(SIDES)}, one for each of {', '.join(SIDES)}.")
    held_out = max(round(_HELD_OUT * count), 1)
    return {"train": count - 2 * held_out, "validation": held_out, "test": held_out}


def write_formulas(
    folder: Path, recipe: Recipe, workers: int | None = None, show: Callable[[int, int], None] = lambda *_: None
) -> Made:
    """Draw formulas into `folder`, which appears when all is there: a Parquet file for each split, and README.md.

    The columns are `image`, PNG bytes and a name, and `text`, LaTeX. A formula is in one split only, in any data set
    of whatever recipe (see `Formula.side`), and never twice.

    Args:
        workers: processes that draw; None: one for each core, where there is enough to do.
        show: called with the number of pictures done and their total.

    Raises:
        UsageError: the folder exists and is not empty, or the level has not so many formulas.
        LoryError: a process was killed, or the disk is full.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; delete it first, or choose another folder.")
    made = Made(rows=count_sides(recipe.count))
    with write_aside(folder) as aside:
        with ExitStack() as files:
            schema = _SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": _FEATURES}})})
            writers = {
                side: files.enter_context(pyarrow.parquet.ParquetWriter(aside / f"{side}.parquet", schema, compression="none"))
                for side in SIDES
            }
            for rows in _batches(recipe, made, workers, show):
                for side, table in rows:
                    writers[side].write_table(table)
        write_text(aside / "README.md", describe(recipe, made))
    return made
