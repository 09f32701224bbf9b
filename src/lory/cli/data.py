"""`lory data`."""

from __future__ import annotations

from typing import Annotated

import typer

from lory.cli.options import ConfigSource, Json, Overrides
from lory.cli.preview import preview

app = typer.Typer(no_args_is_help=True, help="A look at the data.")


@app.command("show")
def show_data(
    config: ConfigSource,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many samples to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Print samples as the model will see them, the learnt tokens in colour, and the counts."""
    from lory.training.config import read_config
    from lory.training.run import prepare

    resolved, _ = read_config(config, overrides or ())
    preview(prepare(resolved), samples=count, as_json=as_json, with_config=False)
