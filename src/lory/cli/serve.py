"""`lory serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lory.cli.options import BaseDtype, Device, Model, Quantize, TrustRemoteCode
from lory.runtime import UsageError


def serve(
    model: Model,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter beside the base; its name is its model's.", metavar="NAME=PATH")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the base is called; by default as MODEL.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than this machine's, it needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the key that clients need.", metavar="NAME")
    ] = "LORY_API_KEY",
    api_key_file: Annotated[Path | None, typer.Option(help="File with that key.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers decoded at a time.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Answers that wait; more get status 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 4096,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt; else the context's.")] = None,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time of one answer.")] = 600.0,
    kept_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of earlier conversations kept in memory for their next question.")
    ] = 2048,
    grace_seconds: Annotated[float, typer.Option(min=0, help="Time for running answers when stopped.")] = 30.0,
    allow_adapter_changes: Annotated[
        list[Path] | None,
        typer.Option(help="Let clients add adapters from below this folder, and remove any.", metavar="FOLDER"),
    ] = None,
    dtype: BaseDtype = None,
    device: Device = None,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model, and adapters on it, to clients of OpenAI's API."""
    adapters = _parse_adapters(adapter or [])
    key = _read_key(api_key_env, api_key_file)
    try:
        from lory.server.run import choose_hosts, run_server
    except ImportError as error:
        raise UsageError(f"Serving needs {error.name}; install it with: pip install 'lory-llm[serve]'.") from error
    from lory.server.app import Service, build_app
    from lory.server.catalogue import open_catalogue
    from lory.server.engine import Engine
    from lory.server.limits import Limits
    from lory.server.metrics import ServerMetrics

    hosts = choose_hosts(host, key)
    limits = Limits(
        max_batch=max_batch,
        queue=queue,
        answer_tokens=max_tokens,
        prompt_tokens=max_prompt_tokens,
        seconds=max_seconds,
        grace_seconds=grace_seconds,
        kept_tokens=kept_tokens,
    )
    bits: Any = quantize.value if quantize else None
    folders = allow_adapter_changes or []
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise UsageError(f"--allow-adapter-changes names {missing}, which is no folder.")
    catalogue, runner = open_catalogue(
        model,
        adapters,
        name,
        # the prompt that is being read has one, too
        places=max_batch + 1,
        changes=bool(folders),
        dtype=dtype.value if dtype else "auto",
        device=device,
        quantize=bits,
        trust_remote_code=trust_remote_code,
    )
    engine = Engine(runner, limits, ServerMetrics())
    app = build_app(Service(catalogue, engine, folders), key, hosts)
    names = ", ".join(served.name for served in catalogue.list())

    def tell(taken: int) -> None:
        address = f"[{host}]" if ":" in host else host
        print(f"Serving {names} at http://{address}:{taken}/v1", flush=True)

    run_server(app, engine, host, port, tell)


def _parse_adapters(given: list[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--adapter {text} was given; an adapter is NAME=PATH, as in pirate=runs/pirate.")
        if name in adapters:
            raise UsageError(f"--adapter names '{name}' twice; give each adapter a name of its own.")
        adapters[name] = path
    return adapters


def _read_key(variable: str, file: Path | None) -> str:
    """The key that clients need; empty: none."""
    if file is None:
        key = os.environ.get(variable, "")
    else:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The key's file {file} could not be read; give a text file with the key.") from error
        if not key:
            raise UsageError(f"The key's file {file} is empty; write the key into it.")
    if not key.isascii() or any(character.isspace() for character in key):
        raise UsageError("The API key has spaces or letters beyond ASCII; choose one without, as a header needs it.")
    return key
