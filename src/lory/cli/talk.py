"""`lory chat`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lory.cli.options import (
    BaseDtype,
    Device,
    Json,
    Model,
    Quantize,
    TrustRemoteCode,
    parse_adapters,
    print_json,
    progress_bar,
)
from lory.runtime import UsageError, log

if TYPE_CHECKING:
    from lory.assistant import Assistant
    from lory.generate import GenerationOptions


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    conf: Annotated[
        list[str] | None, typer.Option(help="Decoding options as :conf takes them, as in temperature=0.7.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of an adapter on the same base, which :adapter NAME puts in place."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Answer the questions in FILE in place of a chat: .txt, one a line, or .json(l) messages."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The answers to --prompts, FILE.jsonl; what is there is not asked again.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions of --prompts that are answered together.")] = 8,
    dtype: BaseDtype = None,
    device: Device = None,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Talk to a model in the terminal; :help lists the commands there. Or let it answer the questions in a file."""
    if prompts is None and output is not None:
        raise UsageError("--output was given without --prompts, the questions whose answers it is for; add them.")
    if prompts is not None and output is None:
        raise UsageError("--prompts was given without --output, the file for the answers; add it.")
    if prompts is not None and not prompts.is_file():
        raise UsageError(f"{prompts} is no file; --prompts is a file of questions.")
    from lory.chat.adapters import open_chat
    from lory.chat.terminal import run_chat

    bits: Any = quantize.value if quantize else None
    name: Any = dtype.value if dtype else "auto"
    assistant, adapters = open_chat(model, parse_adapters(adapter or []), name, device, trust_remote_code, bits)
    options = _read_options(assistant, conf or ())
    if prompts is not None and output is not None:
        about = {"model": model, "dtype": str(assistant.model.dtype), "quantize": bits, **_describe(model)}
        raise typer.Exit(_answer(assistant, prompts, output, about, system, options, batch_size, as_json))
    raise typer.Exit(run_chat(assistant, system, options, adapters, as_json))


def _read_options(assistant: Assistant, texts: Sequence[str]) -> GenerationOptions:
    from lory.chat.session import Session

    session = Session(assistant)
    for text in texts:
        session.set_options(text)
    return session.options


def _describe(model: str) -> dict[str, Any]:
    """What tells whether the weights are the same as before."""
    from lory.models.resolve import fingerprint_weights, resolve

    found = resolve(model)
    folders = [found.base_path, *([found.adapter] if found.adapter else [])]
    return {"weights": [fingerprint_weights(folder) for folder in folders]}


def _answer(
    assistant: Assistant,
    prompts: Path,
    output: Path,
    about: dict[str, Any],
    system: str | None,
    options: GenerationOptions,
    batch_size: int,
    as_json: bool,
) -> int:
    from lory.chat.questions import answer_file
    from lory.models.matmul import choose_fp32_matmul

    log.debug("%s", choose_fp32_matmul(assistant.model.device))
    try:
        with progress_bar(f"Answering {prompts.name}") as show:
            report = answer_file(assistant, prompts, output, about, system, options, batch_size, show)
    except KeyboardInterrupt:
        log.warning("Stopped: %s has what was answered; the same command goes on with the rest.", output)
        return 1
    if as_json:
        print_json(report.to_dict())
    else:
        before = f", {report.there:,} of them before" if report.there else ""
        failed = f", {report.failed:,} of which could not be asked (see 'error' there)" if report.failed else ""
        print(f"{output}: {report.questions:,} questions{before}{failed}")
    return 1 if report.failed else 0
