"""The command line: thin commands, each of which imports what it needs when it is called."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lory.cli import configs, data, evaluate, review, serve, talk, train, web, weights
from lory.runtime import LoryError, log

COMMANDS: tuple[Callable[..., Any], ...] = (
    train.demo,
    train.train,
    talk.chat,
    web.web,
    serve.serve,
    evaluate.eval,
    review.review,
    weights.merge,
    weights.convert,
    train.plot,
)
GROUPS: dict[str, typer.Typer] = {"data": data.app, "configs": configs.app}


def build_app() -> typer.Typer:
    """The command `lory` with all of its commands."""
    app = typer.Typer(
        name="lory",
        help="Turns an open language or vision-language model into your own assistant.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main_options)
    for command in COMMANDS:
        app.command()(command)
    for name, group in GROUPS.items():
        app.add_typer(group, name=name)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from lory import __version__

        print(f"lory {__version__}")
        raise typer.Exit


def _main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say less.")] = False,
) -> None:
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Run the command line: a `LoryError` is one sentence and an exit code, never a traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    # so that what is half-written is cleared away, as after Ctrl-C; a training has a handler of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        build_app()(prog_name="lory")
    except LoryError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
