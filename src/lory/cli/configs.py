"""`lory configs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lory.cli.options import Json, print_json
from lory.runtime import UsageError

app = typer.Typer(no_args_is_help=True, help="The bundled configs, and the schema of all configs.")


@app.command("list")
def list_configs(
    pattern: Annotated[str, typer.Argument(help="Only names that match, as in *chat*.")] = "*", as_json: Json = False
) -> None:
    """List the bundled configs."""
    import fnmatch

    from lory.training.config import list_bundled

    found = {name: text for name, text in list_bundled().items() if fnmatch.fnmatch(name, pattern)}
    titles = {name: text.splitlines()[0].lstrip("# ") for name, text in found.items()}
    if as_json:
        print_json(titles)
    else:
        for config, title in titles.items():
            print(f"{config:<20} {title}")


@app.command("copy")
def copy_config(
    name: Annotated[str, typer.Argument(help="A bundled config's name.")],
    folder: Annotated[Path, typer.Argument(help="Folder to copy it to.")],
) -> None:
    """Copy a bundled config, to make it your own."""
    from lory.runtime import write_text
    from lory.training.config import list_bundled

    bundled = list_bundled()
    if name not in bundled:
        raise UsageError(f"'{name}' is not a bundled config; there are: {', '.join(bundled)}.")
    target = folder / f"{name}.yaml"
    if target.exists():
        raise UsageError(f"{target} exists already; delete it first, or choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} is no folder and cannot be made one: {error.strerror}.") from error
    write_text(target, bundled[name])
    print(target)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a config, for editors."""
    from lory.training.config import Config

    print_json(Config.model_json_schema())
