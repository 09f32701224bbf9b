"""`lory chat`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lory.cli.options import Bits, Dtype, Model


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the base weights.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs, as in cpu or cuda:0.")] = None,
    quantize: Annotated[Bits | None, typer.Option(help="Hold the base in few bits.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Talk to a model in the terminal; :help lists the commands there."""
    from lory.assistant import load
    from lory.chat.terminal import run_chat

    bits: Any = quantize.value if quantize else None
    assistant = load(model, dtype.value if dtype else "auto", device, trust_remote_code, bits)
    raise typer.Exit(run_chat(assistant, system))
