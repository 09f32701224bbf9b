"""`lory train`, `lory demo` and `lory plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lory.cli.options import ConfigSource, Json, Overrides, print_json
from lory.cli.preview import preview
from lory.runtime import UsageError


def train(
    config: ConfigSource,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with a run: last, best or checkpoint-N.", metavar="last|best|checkpoint-N"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as CONFIG says, or go on with a run."""
    from lory.training import run

    if dry_run and resume:
        raise UsageError("Both --dry-run and --resume were given; use one of them.")
    if dry_run:
        from lory.training.config import read_config

        resolved, _ = read_config(config, overrides or ())
        preview(run.prepare(resolved), samples=1, as_json=as_json, with_config=True)
        return
    result = run.train(config, overrides or (), resume)
    if as_json:
        print_json(result.to_dict())
    else:
        print(f"Done: {result.folder}\nTalk to it: lory chat {result.folder}")


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Runs; several are drawn into one picture.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; by default the run's own plots/.")] = None,
    as_json: Json = False,
) -> None:
    """Draw loss, learning rate, gradient norm and accuracy of one run or of several together."""
    from lory.models.resolve import find_run
    from lory.training.plots import plot_runs

    folders = [find_run(run) for run in runs]
    paths = plot_runs(folders, out or (folders[0] / "plots" if len(folders) == 1 else Path("plots")))
    if as_json:
        print_json({"pictures": [str(path) for path in paths]})
    else:
        print("\n".join(str(path) for path in paths))


def demo(
    name: Annotated[str, typer.Option(help="The assistant's new name.")] = "Lory",
    author: Annotated[str, typer.Option(help="Who made it.")] = "Rainbow Lab",
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Give the embedded model a new identity on a CPU, and show what it says before and after."""
    from lory.training.demo import describe_demo, run_demo

    result = run_demo(name, author, out)
    if as_json:
        print_json(result.to_dict())
    else:
        print(describe_demo(result.folder, out))
