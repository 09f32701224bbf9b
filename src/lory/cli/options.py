"""What several commands share: their arguments, and how they print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any

import typer

from lory.runtime import UsageError

Model = Annotated[
    str,
    typer.Argument(help="A run, a checkpoint, an adapter or model folder, a hub id, or smollm2.", metavar="MODEL"),
]
ConfigSource = Annotated[
    str, typer.Argument(help="A YAML file, the name of a bundled config, or a run's folder.", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Fields to set, as in train.epochs=5.", metavar="[SECTION.FIELD=VALUE]...")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


class Bits(str, Enum):
    """Ways to hold a base in few bits."""

    nf4 = "nf4"
    nf4_pure = "nf4-pure"
    int8 = "int8"


class SumMode(str, Enum):
    """How adapters are added up."""

    cat = "cat"
    linear = "linear"


class Dtype(str, Enum):
    """Precisions a model can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


BaseDtype = Annotated[Dtype | None, typer.Option(help="Precision of the base weights.")]
Device = Annotated[str | None, typer.Option(help="Where it runs, as in cpu or cuda:0.")]
Quantize = Annotated[Bits | None, typer.Option(help="Hold the base in few bits.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def progress_bar(title: str) -> Any:
    """A progress bar on standard error as a context manager that gives a function (done, total)."""
    import contextlib

    from rich.console import Console
    from rich.progress import Progress

    @contextlib.contextmanager
    def bar() -> Any:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


def parse_adapters(given: Sequence[str]) -> dict[str, str]:
    """Paths by name, of texts NAME=PATH.

    Raises:
        UsageError: a text is none, or a name comes twice.
    """
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--adapter {text} was given; an adapter is NAME=PATH, as in pirate=runs/pirate.")
        if name in adapters:
            raise UsageError(f"--adapter names '{name}' twice; give each adapter a name of its own.")
        adapters[name] = path
    return adapters
