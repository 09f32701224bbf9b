"""`lory data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lory.cli.formulas import formulas
from lory.cli.generate import generate
from lory.cli.options import ConfigSource, Json, Overrides, print_json
from lory.cli.preview import preview
from lory.runtime import UsageError

app = typer.Typer(no_args_is_help=True, help="A look at the data, and new data.")
app.command("generate")(generate)
app.command("formulas")(formulas)


@app.command("show")
def show_data(
    config: ConfigSource,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many samples of each source to show.")] = 3,
    short: Annotated[bool, typer.Option("--short", help="Shorten long messages.")] = False,
    as_json: Json = False,
) -> None:
    """Print how the sources are read, and samples as the model will see them, the learnt tokens in colour."""
    from lory.training.config import read_config
    from lory.training.run import prepare

    resolved, _ = read_config(config, overrides or ())
    preview(prepare(resolved), samples=count, as_json=as_json, with_config=False, short=short)


@app.command("stats")
def print_statistics(
    config: ConfigSource,
    overrides: Overrides = None,
    picture: Annotated[Path, typer.Option(help="The PNG of the lengths.")] = Path("data-stats.png"),
    as_json: Json = False,
) -> None:
    """Print counts, lengths, duplicates, languages and odd records of each source, and draw the lengths."""
    from lory.cli.stats import gather_stats, print_stats
    from lory.training.config import read_config
    from lory.training.run import prepare

    resolved, _ = read_config(config, overrides or ())
    stats = gather_stats(prepare(resolved), picture)
    if as_json:
        print_json(stats)
    else:
        print_stats(stats)


@app.command("list")
def list_data(
    pattern: Annotated[str, typer.Argument(help="Part of a name, tag or description, or a name with * and ?.")] = "",
    as_json: Json = False,
) -> None:
    """List the data sets that a config can name."""
    from lory.data.sources.registry import describe_registry

    rows = describe_registry(pattern)
    if as_json:
        print_json(rows)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        place = row["hf"] or row["modelscope"] or row["path"]
        licence = f", {row['license']}" if row["license"] else ""
        print(f"{row['name']:<{width}}  {row['description']} ({place}{licence})")
    if not rows:
        raise UsageError(f"No data set's name, tag or description has '{pattern}'; `lory data list` lists all.")


@app.command("formats")
def list_formats(as_json: Json = False) -> None:
    """List the formats that records can have, with their keys."""
    from lory.data.records.formats import FORMATS

    rows = {
        name: {
            "required": list(format.required),
            "either": [list(keys) for keys in format.either],
            "optional": list(format.optional),
            "automatic": format.automatic,
        }
        for name, format in FORMATS.items()
    }
    if as_json:
        print_json(rows)
        return
    for name, format in FORMATS.items():
        choices = " or ".join("+".join(keys) for keys in format.either)
        print(f"{name}: {', '.join([*format.required, *([f'({choices})'] if choices else [])])}")
        if not format.automatic:
            print("  only where the config says so: its keys alone do not tell it")
        if format.optional:
            print(f"  optional: {', '.join(format.optional)}")


@app.command("identity")
def write_identity(
    name: Annotated[str, typer.Option(help="The assistant's name.")],
    author: Annotated[str, typer.Option(help="Who made it.")],
    out: Annotated[Path | None, typer.Option(help="File to write, FILE.jsonl; by default standard output.")] = None,
    seed: Annotated[int, typer.Option(help="Another one pairs questions and answers in another way.")] = 0,
    as_json: Json = False,
) -> None:
    """Write records that teach a model its name and who made it."""
    import json

    from lory.data.making.identity import identity_conversations
    from lory.runtime import write_text

    conversations = identity_conversations(name, author, seed)
    records = [{"messages": [message.to_dict() for message in given.messages]} for given in conversations]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if out is None:
        if as_json:
            print_json({"records": records})
        else:
            print(text, end="")
        return
    if out.exists():
        raise UsageError(f"{out} exists already; delete it first, or choose another file.")
    write_text(out, text)
    if as_json:
        print_json({"path": str(out), "records": len(records)})
    else:
        print(f"{out}: {len(records)} records")
