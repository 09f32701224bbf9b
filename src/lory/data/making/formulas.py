"""A data set of formula pictures with their LaTeX: a Parquet file for each split and a card."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

from lory.data.making.formula_grammar import LEVELS, SIDES, Formula, LevelName, Side, draw_formulas, vocabulary
from lory.data.making.formula_images import Style, render
from lory.runtime import LoryError, UsageError, write_aside, write_text

_HELD_OUT = 0.05
_CHUNK = 64
"""Formulas that are drawn, and written as a row group, together."""
_WORTH_PROCESSES = 512
"""How many formulas are drawn by one process: starting others takes about as long."""
_FEATURES: dict[str, Any] = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
_SCHEMA = pyarrow.schema(
    {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "text": pyarrow.string()},
    # by this mark `datasets` knows the column of images
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a data set is made by; the same recipe makes the same files."""

    count: int
    level: LevelName = "medium"
    style: Style = "print"
    seed: int = 0
    spaced: bool = True
    """Spaces between all tokens of the text, as im2latex has them; otherwise only where LaTeX needs them."""


@dataclass
class Tally:
    """What a data set has."""

    rows: dict[Side, int]
    lengths: list[int] = field(default_factory=list)
    """Tokens of each formula."""
    image_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        count = len(self.lengths)
        middle, most = sorted(self.lengths)[count // 2], max(self.lengths)
        tokens = {"mean": round(sum(self.lengths) / count, 1), "median": middle, "most": most}
        return {"rows": self.rows, "tokens": tokens, "bytes_per_image": round(self.image_bytes / count)}


def count_sides(count: int) -> dict[Side, int]:
    """How many of `count` formulas each split gets: 5% for validation, 5% for the test, at least one each."""
    if count < len(SIDES):
        raise UsageError(f"{count} formulas were asked for; give at least {len(SIDES)}, one for each split.")
    held_out = max(round(_HELD_OUT * count), 1)
    return {"train": count - 2 * held_out, "validation": held_out, "test": held_out}


def write_formulas(
    folder: Path, recipe: Recipe, workers: int | None = None, show: Callable[[int, int], None] | None = None
) -> Tally:
    """Draw formulas into `folder`, which appears when everything is there: SPLIT.parquet for each split, and README.md.

    The columns are `image`, a PNG's bytes and a name, and `text`, LaTeX. No formula comes twice, nor is one in two
    splits, also not in those of data sets by other recipes (see `Formula.side`).

    Args:
        workers: processes that draw; None: one for each core, where there is enough to do.
        show: is told how many pictures are done, and of how many.

    Raises:
        UsageError: the folder is there and not empty, or the level has not so many formulas.
        LoryError: a process was killed, or the disk is full.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; delete it first, or choose another folder.")
    tally = Tally(count_sides(recipe.count))
    with _Painters(recipe, workers) as painters, write_aside(folder) as aside:
        for side in SIDES:
            with pyarrow.parquet.ParquetWriter(
                aside / f"{side}.parquet", _SCHEMA, compression="zstd", use_dictionary=False
            ) as file:
                for formulas, images in painters.paint(side, tally.rows[side]):
                    file.write_table(_make_table(formulas, images, len(tally.lengths), recipe.spaced))
                    tally.lengths += [len(formula.tokens) for formula in formulas]
                    tally.image_bytes += sum(map(len, images))
                    if show:
                        show(len(tally.lengths), recipe.count)
        write_text(aside / "README.md", write_card(recipe, tally))
    return tally


def _make_table(formulas: Sequence[Formula], images: Sequence[bytes], start: int, spaced: bool) -> pyarrow.Table:
    cells = [{"bytes": image, "path": f"{number:07d}.png"} for number, image in enumerate(images, start)]
    texts = [formula.text if spaced else formula.unspaced for formula in formulas]
    return pyarrow.table({"image": cells, "text": texts}, schema=_SCHEMA)


def _paint(formulas: Sequence[Formula], style: Style, seed: tuple[int, ...], start: int) -> list[bytes]:
    # each picture has chances of its own, so that it does not matter who draws which
    return [
        render(formula, style, np.random.default_rng([*seed, number])) for number, formula in enumerate(formulas, start)
    ]


_Painted = tuple[list[Formula], list[bytes]]


class _Painters:
    """One or several processes that draw pictures; closing it stops them."""

    def __init__(self, recipe: Recipe, workers: int | None) -> None:
        self.recipe = recipe
        self.pool: Executor | None = None
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self.count = workers or (cores if recipe.count > _WORTH_PROCESSES else 1)

    def __enter__(self) -> _Painters:
        if self.count > 1:
            # a copy of this process is there at once, where the system has such a thing
            # a copy of this process would share the places in its open font files, and read glyphs from elsewhere
            self.pool = ProcessPoolExecutor(self.count, mp_context=multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def paint(self, side: Side, count: int) -> Iterator[_Painted]:
        """Runs of a split's formulas with their pictures, in order."""
        recipe = self.recipe
        seed = (recipe.seed, SIDES.index(side))
        drawn = draw_formulas(count, recipe.level, recipe.seed, side)
        waiting: collections.deque[tuple[list[Formula], Future[list[bytes]]]] = collections.deque()
        start = 0
        while formulas := list(islice(drawn, _CHUNK)):
            if self.pool is None:
                yield formulas, _paint(formulas, recipe.style, seed, start)
            else:
                waiting.append((formulas, self.pool.submit(_paint, formulas, recipe.style, seed, start)))
            start += len(formulas)
            if len(waiting) > 2 * self.count:
                yield _take(*waiting.popleft())
        while waiting:
            yield _take(*waiting.popleft())


def _take(formulas: list[Formula], images: Future[list[bytes]]) -> _Painted:
    try:
        return formulas, images.result()
    except BrokenProcessPool as error:
        raise LoryError(
            "A process that draws formulas was killed, perhaps for want of memory; use fewer with --workers."
        ) from error


def write_card(recipe: Recipe, tally: Tally) -> str:
    """The data set's README.md: how `datasets` reads it, what is in it, and the command that makes it again."""
    head = {
        "task_categories": ["image-to-text"],
        "tags": ["latex", "ocr", "synthetic"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": side, "path": f"{side}.parquet"} for side in SIDES],
            }
        ],
    }
    level, counts = LEVELS[recipe.level], tally.to_dict()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("matplotlib", "pillow", "numpy"))
    spacing = "--spaced" if recipe.spaced else "--unspaced"
    command = f"lory data formulas DIR -n {recipe.count} --level {recipe.level} --style {recipe.style}"
    rows = "\n".join(f"| {side} | {count:,} |" for side, count in tally.rows.items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---
# Formulas in pictures

{recipe.count:,} formulas out of a grammar, in the style of {recipe.style}, each with its LaTeX. All are different, and
none is in two splits; a formula's split is decided by a hash of its text, so this also holds between data sets of
other seeds, levels and styles.

| split | rows |
| --- | ---: |
{rows}

- `image`: PNG, shades of grey, {counts["bytes_per_image"]:,} bytes on average
- `text`: LaTeX, {"a space between all tokens" if recipe.spaced else "spaces only where LaTeX needs them"}
- level `{recipe.level}`: parts such as fractions up to {level.depth} deep; {level.tokens[0]} to {level.tokens[1]}
  tokens (median {counts["tokens"]["median"]}, mean {counts["tokens"]["mean"]}) out of {len(vocabulary(recipe.level))}

What looks the same is written the same way. Made by

    {command} --seed {recipe.seed} {spacing}

with {versions}; with other versions the pictures may differ by a few pixels.
"""
