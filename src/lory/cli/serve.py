"""`lory serve`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lory.cli.options import BaseDtype, Device, Model, Quantize, TrustRemoteCode, parse_adapters
from lory.runtime import UsageError, log

if TYPE_CHECKING:
    from lory.server.backends import Handover


class Backend(str, Enum):
    """Engines that can serve."""

    lory = "lory"
    vllm = "vllm"
    llama_cpp = "llama-cpp"


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
    max_batch: Annotated[int | None, typer.Option(min=1, help="Answers decoded at a time: 8.")] = None,
    queue: Annotated[int | None, typer.Option(min=0, help="Answers that wait; more get status 429: 64.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer to be asked for: 4096.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt; else the context's.")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0.1, help="Longest time of one answer: 600.")] = None,
    kept_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens of conversations kept for their next question: 2048.")
    ] = None,
    grace_seconds: Annotated[
        float | None, typer.Option(min=0, help="Time for running answers when stopped: 30.")
    ] = None,
    max_body_mb: Annotated[
        float | None, typer.Option(min=0.01, help="Largest request: 4 MB, for a model that sees 32.")
    ] = None,
    allow_image_links: Annotated[
        bool, typer.Option("--allow-image-links", help="Fetch images from the public web, not only data URLs.")
    ] = False,
    max_images: Annotated[int | None, typer.Option(min=0, help="Most images in a request: 8.")] = None,
    max_image_mb: Annotated[float | None, typer.Option(min=0.001, help="Largest file of an image: 10.")] = None,
    max_image_megapixels: Annotated[float | None, typer.Option(min=0.001, help="Largest image: 16.")] = None,
    allow_adapter_changes: Annotated[
        list[Path] | None,
        typer.Option(help="Let clients add adapters from below this folder, and remove any.", metavar="FOLDER"),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="The engine; the others are to be installed.")] = Backend.lory,
    gguf: Annotated[Path | None, typer.Option(help="MODEL as a GGUF file, for llama-cpp.")] = None,
    dtype: BaseDtype = None,
    device: Device = None,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model, and adapters on it, to clients of OpenAI's API."""
    adapters = parse_adapters(adapter or [])
    key = _read_key(api_key_env, api_key_file)
    flags: dict[str, Any] = {
        "queue": queue,
        "max_tokens": max_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "max_seconds": max_seconds,
        "kept_tokens": kept_tokens,
        "grace_seconds": grace_seconds,
        "max_body_mb": max_body_mb,
        "allow_image_links": allow_image_links or None,
        "max_images": max_images,
        "max_image_mb": max_image_mb,
        "max_image_megapixels": max_image_megapixels,
    }
    folders = allow_adapter_changes or []
    if backend is not Backend.lory:
        _refuse(backend, {"device": device, "quantize": quantize, "allow_adapter_changes": folders, **flags})
        from lory.server.address import choose_hosts, find_free_port, name_model
        from lory.server.backends import Handover

        choose_hosts(host, key)
        start = Handover(
            model=Path(),
            name=name or name_model(model),
            host=host,
            port=port or find_free_port(host),
            key=key,
            dtype=dtype.value if dtype else None,
            batch=max_batch,
            trust_remote_code=trust_remote_code,
        )
        _hand_over(backend, model, adapters, gguf, start)
        return
    if gguf is not None:
        raise UsageError("--gguf is for --backend llama-cpp; leave it out, or choose that.")
    try:
        from lory.server.run import run_server
    except ImportError as error:
        raise UsageError(f"Serving needs {error.name}; install it with: pip install 'lory-llm[serve]'.") from error
    from lory.server.address import choose_hosts, write_url
    from lory.server.app import Service, build_app
    from lory.server.catalogue import open_catalogue
    from lory.server.engine import Engine
    from lory.server.limits import Limits
    from lory.server.metrics import ServerMetrics

    hosts = choose_hosts(host, key)
    limits = _read_limits({"max_batch": max_batch, **flags})
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise UsageError(f"--allow-adapter-changes names {missing}, which is no folder.")
    bits: Any = quantize.value if quantize else None
    catalogue, runner = open_catalogue(
        model,
        adapters,
        name,
        # the prompt that is being read has one, too
        places=Limits(**limits).max_batch + 1,
        changes=bool(folders),
        dtype=dtype.value if dtype else "auto",
        device=device,
        quantize=bits,
        trust_remote_code=trust_remote_code,
    )
    if catalogue.sees_images:
        limits.setdefault("body_bytes", 2**25)
    engine = Engine(runner, Limits(**limits), ServerMetrics())
    app = build_app(Service(catalogue, engine, folders), key, hosts)
    names = ", ".join(served.name for served in catalogue.list())
    run_server(app, engine, host, port, lambda taken: print(f"Serving {names} at {write_url(host, taken)}", flush=True))


# The options whose fields in `Limits` have other names
_FIELDS = {
    "max_tokens": "answer_tokens",
    "max_prompt_tokens": "prompt_tokens",
    "max_seconds": "seconds",
    "max_body_mb": "body_bytes",
    "allow_image_links": "image_links",
    "max_images": "images",
    "max_image_mb": "image_bytes",
    "max_image_megapixels": "image_pixels",
}


def _read_limits(flags: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Limits` that were given."""
    given = {name: value for name, value in flags.items() if value is not None}
    millions = {name: round(value * 1e6) for name, value in given.items() if name.endswith(("_mb", "_megapixels"))}
    return {_FIELDS.get(name, name): value for name, value in {**given, **millions}.items()}


def _refuse(backend: Backend, given: dict[str, Any]) -> None:
    """Refuse what another engine would not heed."""
    if named := next((name for name, value in given.items() if value is not None and value != []), None):
        flag = named.replace("_", "-")
        raise UsageError(f"--{flag} is for lory's own engine; leave it out, or leave out --backend {backend.value}.")


def _hand_over(backend: Backend, model: str, adapters: dict[str, str], gguf: Path | None, start: Handover) -> None:
    """Let another engine serve, until it ends."""
    from lory.server import backends

    if backend is Backend.llama_cpp:
        _refuse(backend, {"adapter": list(adapters), "dtype": start.dtype})
        backends.hand_to_llama_cpp(replace(start, model=backends.find_gguf(model, gguf)))
        return
    if gguf is not None:
        raise UsageError("--gguf is for --backend llama-cpp; vLLM takes the model's folder as it is.")
    with tempfile.TemporaryDirectory(prefix="lory-merged-") as folder:
        taken = _merge_if_needed(model, Path(folder) / "model", start.trust_remote_code)
        backends.hand_to_vllm(backends.prepare_vllm(taken, adapters, start))


def _merge_if_needed(model: str, out: Path, trust: bool) -> str:
    """MODEL, or where it is an adapter that vLLM cannot take, the folder it was merged into."""
    from lory.models.resolve import resolve
    from lory.server.backends import why_vllm_cannot

    adapter = resolve(model).adapter
    if adapter is None or not (reason := why_vllm_cannot(adapter)):
        return model
    from lory import export

    log.info("vLLM cannot take '%s' as an adapter, since %s; merging it into its base ...", model, reason)
    return str(export.merge(model, out, trust_remote_code=trust).folder)


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
