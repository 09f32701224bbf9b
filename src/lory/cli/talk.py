"""`lory chat`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lory.cli.options import BaseDtype, Device, Model, Quantize, TrustRemoteCode


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    dtype: BaseDtype = None,
    device: Device = None,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model in the terminal; :help lists the commands there."""
    from lory.assistant import load
    from lory.chat.terminal import run_chat

    bits: Any = quantize.value if quantize else None
    assistant = load(model, dtype.value if dtype else "auto", device, trust_remote_code, bits)
    raise typer.Exit(run_chat(assistant, system))
