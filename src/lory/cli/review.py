"""`lory review`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lory.cli.options import Json, print_json
from lory.runtime import UsageError


def review(
    queue: Annotated[Path, typer.Argument(help="A review queue, as of lory eval --review.", metavar="FILE")],
    export: Annotated[
        Path | None, typer.Option(help="Write what was decided as training data, FILE.jsonl, in place of reviewing.")
    ] = None,
    preferences: Annotated[
        bool, typer.Option("--preferences", help="Export pairs of a better and a worse answer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look at odd answers one by one: accept, edit or reject each, and make training data of them."""
    from lory.chat import review as reviews

    if preferences and export is None:
        raise UsageError("--preferences was given without --export; name the file to write.")
    if export is not None:
        write = reviews.export_preferences if preferences else reviews.export_answers
        count = write(queue, export)
        if as_json:
            print_json({"path": str(export), "records": count})
        else:
            print(f"{export}: {count} {'pairs' if preferences else 'records'}")
    elif as_json:
        print_json({"path": str(queue), **reviews.count_decisions(queue)})
    else:
        raise typer.Exit(reviews.run_review(queue))
