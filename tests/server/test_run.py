"""A signal lets a server finish what it has begun; and `lory serve` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.conftest import Server

from lory.cli import serve as command_line
from lory.runtime import UsageError
from lory.server.engine import Engine
from lory.server.run import run_server

Serve = Callable[..., contextlib.AbstractContextManager[Server]]
PROGRAM = "import typer; from lory.cli.serve import serve; typer.run(serve)"


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "The fox", "max_tokens": tokens, "logit_bias": {"2": -100}, "stream": True} | more


@contextlib.contextmanager
def streaming(url: str, tokens: int) -> Iterator[Iterator[str]]:
    """The lines of an answer that has begun."""
    with httpx.Client() as client, client.stream("POST", f"{url}/v1/completions", json=body(tokens)) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_a_signal_lets_answers_finish_and_refuses_new_ones(serve: Serve) -> None:
    # the client is made first, since that takes longer than some answers
    with serve(step_seconds=0.02) as server, httpx.Client() as other, streaming(server.url, 60) as lines:
        server.process.handle_exit(signal.SIGTERM, None)
        refused = other.post(f"{server.url}/v1/completions", json=body(1))
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "The server is shutting down."
        assert "Retry-After" in refused.headers
        assert other.get(f"{server.url}/health").status_code == 503
        said = list(lines)
        assert said[-2] == "data: [DONE]"
        assert '"finish_reason": "length"' in said[-4]
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_an_answer_that_takes_longer_than_the_grace_is_told_so(serve: Serve) -> None:
    with serve(step_seconds=0.02, grace_seconds=0.1) as server, streaming(server.url, 400) as lines:
        server.process.handle_exit(signal.SIGTERM, None)
        assert "The server is shutting down." in list(lines)[-2]
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_a_second_signal_ends_it_at_once(serve: Serve) -> None:
    with serve(step_seconds=0.02) as server, streaming(server.url, 400):
        server.process.handle_exit(signal.SIGTERM, None)
        server.process.handle_exit(signal.SIGTERM, None)
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_an_address_in_use_is_told(serve: Serve) -> None:
    with serve() as server:
        port = int(server.url.rpartition(":")[2])
        engine = Engine(server.engine.runner, server.engine.limits, server.engine.metrics)
        with pytest.raises(UsageError, match=f"Could not listen on 127.0.0.1:{port}"):
            run_server(server.process.config.loaded_app, engine, "127.0.0.1", port, lambda _: None)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_command_serves_and_stops(tiny_model: Path, tiny_adapter: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_model), "--adapter", f"own={tiny_adapter}", "--port", "0"]
    environment = {**os.environ, "LORY_API_KEY": "key"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            match = re.search(r"http://\S+", process.stdout.readline())
            assert match is not None
            answer = httpx.get(f"{match[0]}/models", headers={"Authorization": "Bearer key"})
            assert [model["id"] for model in answer.json()["data"]] == [tiny_model.name, "own"]
            assert httpx.get(f"{match[0]}/models").status_code == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"host": "0.0.0.0"}, "an API key is needed"),
        ({"adapter": ["nothing"]}, "NAME=PATH"),
        ({"adapter": ["a=x", "a=y"]}, "'a' twice"),
        ({"allow_adapter_changes": [Path("nowhere")]}, "is no folder"),
        ({"api_key_file": Path("nowhere")}, "could not be read"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], sentence: str
) -> None:
    monkeypatch.delenv("LORY_API_KEY", raising=False)
    with pytest.raises(UsageError, match=sentence):
        command_line.serve(str(tiny_model), **arguments)


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    monkeypatch.setenv("SOME_KEY", "of-the-environment")
    assert command_line._read_key("SOME_KEY", file) == "of-the-file"
    assert command_line._read_key("SOME_KEY", None) == "of-the-environment"
    assert command_line._read_key("NO_KEY", None) == ""
    for wrong in ("", "two words", "schlüssel"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(UsageError):
            command_line._read_key("SOME_KEY", file)
