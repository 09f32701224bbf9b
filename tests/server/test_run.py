"""`lory serve` as a process: it says where it is, and a signal lets it finish what it has begun."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

PROGRAM = "import typer; from lory.cli.serve import serve; typer.run(serve)"
LONG = {"prompt": "The fox", "max_tokens": 480, "n": 8, "temperature": 1, "logit_bias": {"2": -100}, "stream": True}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *arguments]


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and its address."""
    environ = {**os.environ, **environment}
    with subprocess.Popen(command(*arguments, "--port", "0"), stdout=subprocess.PIPE, text=True, env=environ) as server:
        try:
            assert server.stdout is not None
            match = re.search(r"http://\S+", server.stdout.readline())
            assert match is not None
            yield server, match[0]
        finally:
            server.kill()


def test_a_signal_lets_answers_finish_and_refuses_new_ones(tiny_model: Path, tiny_adapter: Path) -> None:
    with process(str(tiny_model), "--adapter", f"own={tiny_adapter}") as (server, url), httpx.Client() as client:
        names = [model["id"] for model in client.get(f"{url}/models").json()["data"]]
        assert names == [tiny_model.name, "own"]
        with client.stream("POST", f"{url}/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):
                while (refused := httpx.post(f"{url}/completions", json={**LONG, "stream": False})).status_code == 200:
                    continue
                assert refused.status_code == 503
                assert refused.json()["error"]["message"] == "The server is shutting down."
            said = list(lines)
        assert said[-2] == "data: [DONE]"
        assert sum('"finish_reason": "length"' in line for line in said) == 8
        assert server.wait(20) == 0


def test_an_answer_that_takes_too_long_is_told_so(tiny_model: Path) -> None:
    with process(str(tiny_model), "--grace-seconds", "0") as (server, url), httpx.Client() as client:
        with client.stream("POST", f"{url}/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            said = list(lines)
        assert "The server is shutting down." in said[-2]
        assert server.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "an API key is needed"),
        (["--adapter", "nothing"], "NAME=PATH"),
        (["--allow-adapter-changes", "nowhere"], "is no folder"),
        (["--api-key-file", "nowhere"], "could not be read"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(tiny_model: Path, arguments: list[str], sentence: str) -> None:
    done = subprocess.run(command(str(tiny_model), *arguments), capture_output=True, text=True, check=False)
    assert done.returncode
    assert sentence in done.stderr


def test_a_key_comes_from_the_environment_or_a_file(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("other\n")
    with process(str(tiny_model), "--api-key-file", str(file), LORY_API_KEY="one") as (_, url):
        for key, status in (("one", 401), ("other", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/models", headers=headers).status_code == status
