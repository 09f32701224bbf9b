"""`lory data formulas`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lory.cli.options import Json, print_json, progress_bar


class FormulaLevel(str, Enum):
    """How large formulas get."""

    easy = "easy"
    medium = "medium"
    hard = "hard"


class FormulaStyle(str, Enum):
    """How pictures look."""

    print = "print"
    typeset = "typeset"
    handwriting = "handwriting"


def formulas(
    folder: Annotated[Path, typer.Argument(help="Folder to make, with a Parquet file a split.", metavar="DIR")],
    count: Annotated[int, typer.Option("-n", min=3, help="How many formulas.")] = 5000,
    level: Annotated[
        FormulaLevel,
        typer.Option(help="Parts such as fractions up to 1, 2 or 3 deep; up to 40, 90 or 130 tokens."),
    ] = FormulaLevel.medium,
    style: Annotated[FormulaStyle, typer.Option(help="How the pictures look.")] = FormulaStyle.print,
    seed: Annotated[int, typer.Option(min=0, help="Another one draws other formulas and pictures.")] = 0,
    spaced: Annotated[
        bool, typer.Option("--spaced/--unspaced", help="Spaces between all tokens, as im2latex has them, or few.")
    ] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that draw; by default one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Draw formulas out of a grammar, and write the pictures with their LaTeX as a data set for image to text."""
    from lory.data.making.formulas import Recipe, write_formulas

    recipe = Recipe(count, level.value, style.value, seed, spaced)
    with progress_bar("drawing formulas") as show:
        tally = write_formulas(folder, recipe, workers, show)
    told = tally.to_dict()
    if as_json:
        print_json({"path": str(folder), **told})
        return
    print(f"{folder}: " + ", ".join(f"{rows:,} {side}" for side, rows in tally.rows.items()))
    median, most = told["tokens"]["median"], told["tokens"]["most"]
    print(f"  {median} tokens a formula (median; most {most}), {told['bytes_per_image']:,} bytes a picture")
