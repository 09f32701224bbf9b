"""A server is safe as it starts: keys, hosts, sizes, and folders that nobody reaches into."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.conftest import Server, make_adapter, running, wait_until

from lory.runtime import UsageError, is_loopback
from lory.server.address import choose_hosts
from lory.server.catalogue import Catalogue, open_catalogue
from lory.server.limits import Limits

BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., contextlib.AbstractContextManager[Server]]) -> Iterator[Server]:
    with serve(key="secret-key", body_bytes=2000, max_batch=2) as started:
        yield started


def post(server: Server, path: str = "/v1/chat/completions", key: str = "secret-key", **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} | more.pop("headers", {})
    return httpx.post(server.url + path, headers=headers, **({"json": BODY} | more))


def test_a_key_is_needed_for_all_but_health(guarded: Server) -> None:
    assert post(guarded).status_code == 200
    for key in ("wrong", "secret-key2", "secret-ke", "secret-kéy"):
        answer = post(guarded, headers={"Authorization": f"Bearer {key}".encode()})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "secret" not in answer.text
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        assert httpx.get(guarded.url + path).status_code == 401
    assert httpx.get(f"{guarded.url}/health").status_code == 200


def test_an_address_for_others_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        assert not is_loopback(host)
        assert choose_hosts(host, "key") is None
        with pytest.raises(UsageError, match="an API key is needed"):
            choose_hosts(host, "")
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert "localhost" in (choose_hosts(host, "") or ())


def test_a_page_that_gives_this_machine_another_name_is_refused(guarded: Server) -> None:
    assert post(guarded, headers={"Host": "evil.example"}).status_code == 403
    assert post(guarded, headers={"Host": "127.0.0.1:1234"}).status_code == 200


def test_a_form_of_another_site_is_refused(guarded: Server) -> None:
    answer = post(guarded, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_content_type"


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(guarded: Server) -> None:
    big = b'{"messages": "' + b"x" * 3000 + b'"}'
    headers = {"Content-Type": "application/json"}
    assert post(guarded, content=big, headers=headers, json=None).status_code == 413
    chunks = (big[place : place + 500] for place in range(0, len(big), 500))
    assert post(guarded, content=chunks, headers=headers, json=None).status_code == 413


def test_bodies_of_all_requests_together_are_limited(
    serve: Callable[..., contextlib.AbstractContextManager[Server]],
) -> None:
    with serve(held_bytes=1500, body_bytes=2000) as server:
        body = {"prompt": "x" * 1600, "max_tokens": 2}
        for _ in range(2):
            answer = post(server, "/v1/completions", json=body)
            assert answer.status_code == 503
            assert "too many large requests" in answer.json()["error"]["message"]
            # what was held for an answer, or a refusal, is free afterwards
            assert post(server, "/v1/completions", json={**body, "prompt": "x" * 400}).status_code == 200


def test_a_body_that_comes_in_drops_is_cut_off(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lory.server.guard._BODY_SECONDS", 0.3)

    def drip() -> Iterator[bytes]:
        for _ in range(20):
            time.sleep(0.1)
            yield b" "

    headers = {"Content-Type": "application/json"}
    started = time.monotonic()
    with contextlib.suppress(httpx.WriteError):
        assert post(guarded, content=drip(), headers=headers, json=None).status_code == 408
    assert time.monotonic() - started < 1.9


def test_a_broken_request_harms_nobody(guarded: Server) -> None:
    port = int(guarded.url.rpartition(":")[2])
    for lines in (
        b"GET / HTTP/9\r\n\r\n",
        b"\x16\x03\x01",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(lines)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)
    assert post(guarded).status_code == 200


@pytest.fixture(scope="module")
def changing(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server that takes adapters from a folder, which holds two, and one out of reach beside it."""
    folder = tmp_path_factory.mktemp("changing")
    make_adapter(tiny_model, folder / "allowed" / "one", 1)
    make_adapter(tiny_model, folder / "allowed" / "dora", 2, type="dora")
    make_adapter(tiny_model, folder / "outside", 3)
    (folder / "allowed" / "link").symlink_to(folder / "outside")
    opened = open_catalogue(str(tiny_model), {}, "tiny", changes=True)
    with running(opened, Limits(max_batch=2), folders=(folder / "allowed",)) as server:
        yield server, folder


def test_adapters_come_and_go_while_the_server_runs(changing: tuple[Server, Path]) -> None:
    server, _ = changing

    def say(model: str) -> httpx.Response:
        return post(server, json={**BODY, "model": model, "temperature": 0, "max_tokens": 9})

    base = say("tiny").json()["choices"]
    assert say("one").status_code == 404
    for _ in range(2):
        added = post(server, "/v1/adapters", json={"name": "one", "path": "one"})
        assert added.json()["id"] == "one"
        assert post(server, "/v1/adapters", json={"name": "one", "path": "one"}).status_code == 400
        assert say("one").json()["choices"] != base == say("tiny").json()["choices"]
        assert httpx.delete(f"{server.url}/v1/adapters/one").json()["deleted"]
        assert say("one").status_code == 404
        assert wait_until(lambda: not (server.engine.runner.bank and server.engine.runner.bank._adapters))
    assert httpx.delete(f"{server.url}/v1/adapters/tiny").status_code == 404


@pytest.mark.parametrize("path", ["../outside", "link", "/etc", "..", "one/../../outside"])
def test_an_adapter_from_elsewhere_is_refused(changing: tuple[Server, Path], path: str) -> None:
    for given in (path, str(changing[1] / "outside")):
        answer = post(changing[0], "/v1/adapters", json={"name": "x", "path": given})
        assert answer.status_code == 400
        assert "not below a folder" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["one\0", "a" * 300, "nothing", "one/adapter_config.json/x"])
def test_an_adapter_at_a_path_that_cannot_be_is_refused(changing: tuple[Server, Path], path: str) -> None:
    answer = post(changing[0], "/v1/adapters", json={"name": "x", "path": path})
    assert answer.status_code == 400, answer.text


def test_what_cannot_be_added_is_said(changing: tuple[Server, Path]) -> None:
    answer = post(changing[0], "/v1/adapters", json={"name": "x", "path": "dora"})
    assert answer.status_code == 400
    assert "DoRA" in answer.json()["error"]["message"]
    assert post(changing[0], "/v1/adapters", json={"name": "x", "path": "none"}).status_code == 400
    assert post(changing[0], "/v1/adapters", json={"name": "a b", "path": "one"}).status_code == 400
    assert [model["id"] for model in httpx.get(f"{changing[0].url}/v1/models").json()["data"]] == ["tiny"]


def test_adapters_are_limited_and_refused_when_the_server_stops(tiny_model: Path, tmp_path: Path) -> None:
    make_adapter(tiny_model, tmp_path / "one", 1)
    opened = open_catalogue(str(tiny_model), {}, "tiny", changes=True)
    with running(opened, Limits(adapters=1), folders=(tmp_path,)) as server:
        assert post(server, "/v1/adapters", json={"name": "a", "path": "one"}).status_code == 200
        assert "the most" in post(server, "/v1/adapters", json={"name": "b", "path": "one"}).json()["error"]["message"]
        assert httpx.delete(f"{server.url}/v1/adapters/a").status_code == 200
        server.engine.close()
        assert post(server, "/v1/adapters", json={"name": "b", "path": "one"}).status_code == 503


def test_adapters_that_a_batch_cannot_mix_are_refused_at_start(tiny_model: Path, tmp_path: Path) -> None:
    whole = make_adapter(tiny_model, tmp_path / "whole", 1, modules_to_save=["lm_head"])
    embedding = make_adapter(tiny_model, tmp_path / "embedding", 1, targets=["embed_tokens"])
    for folder, sentence in ((whole, "as a whole"), (embedding, "no linear layer")):
        with pytest.raises(UsageError, match=sentence):
            open_catalogue(str(tiny_model), {"x": str(folder)})
    with pytest.raises(UsageError, match="is an adapter itself"):
        open_catalogue(str(embedding), {"x": str(whole)})
    with pytest.raises(UsageError, match="is a whole model"):
        open_catalogue(str(tiny_model), {"x": str(tiny_model)})


def test_an_adapter_of_any_kind_is_served_alone(tiny_model: Path, tmp_path: Path) -> None:
    catalogue: Catalogue = open_catalogue(str(make_adapter(tiny_model, tmp_path / "dora", 1, type="dora")), {})[0]
    assert [served.name for served in catalogue.list()] == ["dora"]
