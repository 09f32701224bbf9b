"""Other engines in the server's place: vLLM and llama.cpp, started with the same model, names, address and key.

What is called is vLLM's ``vllm serve``, llama.cpp's ``llama-server``, or the server of llama-cpp-python.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lory.adapters.files import AdapterFiles, read_adapter_config
from lory.adapters.prompt import is_soft_prompt
from lory.data.encoding.templates import render_prompt
from lory.models import embedded
from lory.models.load import load_tokenizer
from lory.models.resolve import Resolved, resolve
from lory.models.vision import has_processor
from lory.runtime import LoryError, UsageError, is_loopback, log
from lory.server.address import write_url
from lory.types import Message

# What vLLM takes for --max-lora-rank
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Layers whose adapters not every vLLM takes
_ENDS = ("embed_tokens", "wte", "lm_head")
_PROBE = [Message("user", "Who are you?"), Message("assistant", "An assistant."), Message("user", "Of whom?")]


@dataclass(frozen=True)
class Handover:
    """What another engine is to serve."""

    model: Path
    """The folder of a model; for llama.cpp a GGUF file."""
    name: str
    host: str
    port: int
    key: str = field(default="", repr=False)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """By the names that requests give."""
    rank: int = 0
    """The largest of the adapters'."""
    tokenizer: Path | None = None
    """Where it is not the model's."""
    dtype: str | None = None
    batch: int | None = None
    """Answers at a time."""
    sees: bool = False
    """Whether the model takes images."""
    trust_remote_code: bool = False


def write_vllm_command(given: Handover) -> list[str]:
    """The command line of vLLM's server."""
    command = ["vllm", "serve", str(given.model), "--served-model-name", given.name]
    command += ["--host", given.host, "--port", str(given.port)]
    if given.tokenizer is not None:
        command += ["--tokenizer", str(given.tokenizer)]
    if given.dtype is not None:
        command += ["--dtype", given.dtype]
    if given.batch is not None:
        command += ["--max-num-seqs", str(given.batch)]
    if given.trust_remote_code:
        command += ["--trust-remote-code"]
    if given.sees:
        # a list that no server is on: vLLM would fetch images from private networks, too
        command += ["--allowed-media-domains", "none.invalid"]
    if given.adapters:
        rank = next(rank for rank in _RANKS if rank >= given.rank)
        command += ["--enable-lora", "--max-loras", str(len(given.adapters)), "--max-lora-rank", str(rank)]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in given.adapters.items())]
    return command


def write_llama_server_command(given: Handover) -> list[str]:
    """The command line of llama.cpp's own server; `--jinja` takes the chat template that is in the file."""
    command = ["llama-server", "--model", str(given.model), "--alias", given.name, "--jinja"]
    command += ["--host", given.host, "--port", str(given.port)]
    return command + (["--parallel", str(given.batch)] if given.batch is not None else [])


def write_llama_python_command(given: Handover) -> list[str]:
    """The command line of llama-cpp-python's server, with all of the model's context."""
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(given.model), "--model_alias", given.name]
    return [*command, "--host", given.host, "--port", str(given.port), "--n_ctx", "0"]


def why_vllm_cannot(adapter: Path) -> str:
    """Why vLLM cannot put this adapter beside a base; empty where it can."""
    if is_soft_prompt(adapter):
        return "it is a soft prompt"
    config = read_adapter_config(adapter)
    if config.get("use_dora"):
        return "it is a DoRA adapter"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "its layers differ in rank or alpha"
    files = AdapterFiles(adapter)
    if files.whole:
        return f"it holds '{min(files.whole)}' as a whole"
    if end := next((path for path in files.modules if path.endswith(_ENDS)), None):
        return f"it adapts '{end}'"
    if find_rank(adapter) > _RANKS[-1]:
        return f"its rank is above {_RANKS[-1]}"
    return ""


def find_rank(adapter: Path) -> int:
    """The largest rank of an adapter's layers."""
    files = AdapterFiles(adapter)
    return max((files.rank(module) for module in files.modules), default=1)


def prepare_vllm(model: str, adapters: Mapping[str, str], start: Handover) -> Handover:
    """What vLLM is to serve.

    Args:
        start: names, address and key; the rest is found here.
        model: a MODEL; where it is an adapter, vLLM has to take it (see `why_vllm_cannot`).

    Raises:
        UsageError: an adapter is none, or one that vLLM cannot take or would answer for in another way.
    """
    resolved = resolve(model)
    start = replace(start, model=resolved.base_path, sees=has_processor(resolved.base_path))
    if resolved.adapter is not None:
        if adapters:
            raise UsageError(
                f"'{model}' is an adapter itself; give its base, '{resolved.base}', and the adapter with --adapter."
            )
        log.info("'%s' is an adapter: requests that name no model are answered by its base.", start.name)
        own = {start.name: resolved.adapter}
        name = f"{start.name}-base" if resolved.base == start.name else resolved.base
        return replace(
            start, name=name, adapters=own, rank=find_rank(resolved.adapter), tokenizer=resolved.tokenizer_path
        )
    folders = {}
    for name, path in adapters.items():
        found = resolve(path)
        if found.adapter is None:
            raise UsageError(f"'{path}' was given as an adapter, but is a whole model; serve it as MODEL.")
        if reason := why_vllm_cannot(found.adapter):
            raise UsageError(f"vLLM cannot serve the adapter '{name}' beside others, since {reason}; serve it alone.")
        _check_template(name, resolved, found, start.trust_remote_code)
        folders[name] = found.adapter
    return replace(start, adapters=folders, rank=max(map(find_rank, folders.values()), default=0))


def _check_template(name: str, base: Resolved, adapter: Resolved, trust: bool) -> None:
    """Refuse an adapter whose prompts are written otherwise than the base's, which vLLM would take for it."""
    prompts = [render_prompt(load_tokenizer(one, trust), _PROBE) for one in (base, adapter)]
    if prompts[0] != prompts[1]:
        raise UsageError(
            f"The adapter '{name}' was trained with a chat template or tokenizer of its own, and vLLM would answer for "
            "it with the base's; serve it alone, as MODEL."
        )


def find_gguf(model: str, gguf: Path | None) -> Path:
    """The GGUF file of a model: the one given, MODEL itself, the embedded model's, or the only one in its folder.

    Raises:
        UsageError: there is none, or there are several.
    """
    own = Path(model) if model.endswith(".gguf") else None
    if given := gguf or own:
        if not given.is_file():
            raise UsageError(f"The GGUF file {given} does not exist.")
        return given
    if model == embedded.NAME:
        return embedded.find_gguf()
    resolved = resolve(model)
    if resolved.adapter is not None:
        raise UsageError(
            f"'{model}' is an adapter, which llama.cpp has not as GGUF; merge it with `lory merge`, convert the result "
            "with llama.cpp's convert_hf_to_gguf.py, and give the file with --gguf."
        )
    found = sorted(resolved.base_path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{resolved.base_path} has {len(found)} GGUF files; give one with --gguf.")
    raise UsageError(
        f"{resolved.base_path} has no GGUF file, which llama.cpp needs; make one with its convert_hf_to_gguf.py and "
        "give it with --gguf."
    )


def hand_to_vllm(given: Handover) -> None:
    """Run vLLM's server until it ends.

    Raises:
        UsageError: vLLM is not installed.
        LoryError: it failed.
    """
    if shutil.which("vllm") is None:
        raise UsageError("There is no vllm here; install it with: pip install vllm (it needs a GPU, see docs.vllm.ai).")
    if not is_loopback(given.host):
        log.warning(
            "vLLM asks for the key under /v1 only; keep other paths from other machines, as by a reverse proxy."
        )
    _run(write_vllm_command(given), {"VLLM_API_KEY": given.key}, given)


def hand_to_llama_cpp(given: Handover) -> None:
    """Run llama.cpp's server, or llama-cpp-python's where there is no other, until it ends.

    Raises:
        UsageError: neither is installed, or it cannot do what is asked for.
        LoryError: it failed.
    """
    if shutil.which("llama-server") is not None:
        _run(write_llama_server_command(given), {"LLAMA_API_KEY": given.key}, given)
    elif all(importlib.util.find_spec(name) for name in ("llama_cpp", "sse_starlette", "starlette_context")):
        if given.batch is not None:
            raise UsageError("llama-cpp-python answers one request at a time; leave --max-batch out.")
        _run(write_llama_python_command(given), {"API_KEY": given.key}, given)
    else:
        raise UsageError(
            "There is neither llama-server nor llama-cpp-python's server here; install llama.cpp (see "
            "github.com/ggml-org/llama.cpp), or: pip install 'llama-cpp-python[server]'."
        )


def _run(command: Sequence[str], key: Mapping[str, str], given: Handover) -> None:
    """Run a command, with the key in its environment, where other users of the machine do not see it."""
    log.info("Handing over to: %s", " ".join(command))
    names = ", ".join([given.name, *given.adapters])
    print(f"Serving {names} at {write_url(given.host, given.port)} when the engine is ready", flush=True)
    environment = {**os.environ, **{name: value for name, value in key.items() if value}}
    stopped = False
    # in a group of its own, so that a signal reaches it once, through here
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:

        def pass_on(number: int, frame: object) -> None:
            nonlocal stopped
            stopped = True
            process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if status and not stopped:
        raise LoryError(f"{Path(command[0]).name} ended with status {status}; what it wrote says why.")
