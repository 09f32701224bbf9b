"""Who may reach the page, and what it gives away: nothing to other sites, and no file."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lory.assistant import load
from lory.chat.web.desk import Desk
from lory.cli.web import web
from lory.runtime import UsageError, is_loopback

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")

from lory.chat.web.run import check_access, make_check, serve_page  # noqa: E402

PASSWORD = "squawk ü"


@pytest.fixture(scope="module")
def desk(tiny_model: Path) -> Desk:
    return Desk({"tiny": load(tiny_model)})


@pytest.fixture(scope="module")
def address(desk: Desk) -> Iterator[str]:
    with serve_page(desk) as (address, link):
        assert link is None
        yield address


@pytest.mark.parametrize(
    ("host", "share"), [("0.0.0.0", False), ("192.168.1.5", False), ("::", False), ("localhost", True)]
)
def test_what_others_can_reach_needs_a_password(host: str, share: bool) -> None:
    with pytest.raises(UsageError, match="password"):
        check_access(host, share, "")
    check_access(host, share, PASSWORD)


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False), ("x.org", False)]
)
def test_which_addresses_are_this_machines(host: str, own: bool) -> None:
    assert is_loopback(host) is own
    if own:
        check_access(host, False, "")


def test_the_password_is_asked_for_under_any_name_and_guessing_takes_time() -> None:
    check = make_check(PASSWORD)

    async def try_all() -> list[bool]:
        return [*await asyncio.gather(*(check("me", given) for given in (PASSWORD, "x", "")))]

    began = time.monotonic()
    assert asyncio.run(try_all()) == [True, False, False]
    assert time.monotonic() - began >= 2.0


def test_every_answer_forbids_other_hosts(address: str) -> None:
    answer = httpx.get(address, timeout=60)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http:" not in policy
    assert "*" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_name_that_is_not_this_machines_is_refused(address: str) -> None:
    assert httpx.get(address, timeout=60, headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    "path", ["gradio_api/file=/etc/hostname", "gradio_api/file=pyproject.toml", "openapi.json", "docs"]
)
def test_no_file_and_no_description_is_served(address: str, path: str) -> None:
    assert httpx.get(address + path, timeout=60).status_code in (403, 404)


def test_the_handlers_are_not_offered_as_an_api(address: str) -> None:
    info = httpx.get(f"{address}gradio_api/info", timeout=60).json()
    assert (info["named_endpoints"], info["unnamed_endpoints"]) == ({}, {})


def test_nothing_is_shown_without_the_password(desk: Desk) -> None:
    with serve_page(desk, password=PASSWORD) as (address, _), httpx.Client(base_url=address, timeout=60) as client:
        config = client.get("config")
        assert config.status_code == 401
        assert "components" not in config.text
        wrong = client.post("login", data={"username": "me", "password": "guess"})
        assert wrong.status_code == 400
        assert client.get("config").status_code == 401
        assert client.post("login", data={"username": "me", "password": PASSWORD}).status_code == 200
        assert "components" in client.get("config").text


def test_a_port_that_is_taken_is_said(desk: Desk, address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(UsageError, match=str(port)), serve_page(desk, port=port):
        pass


def test_the_command_refuses_before_it_loads_anything() -> None:
    with pytest.raises(UsageError, match="password"):
        web("no-such-model", host="0.0.0.0")
    with pytest.raises(UsageError, match="one of them"):
        web("no-such-model", gpu=True, cpu=True)
    with pytest.raises(UsageError, match="NAME=PATH"):
        web("no-such-model", adapter=["x"])
    with pytest.raises(UsageError, match="no-such-model"):
        web("no-such-model")


def test_the_page_is_not_loaded_for_other_commands() -> None:
    program = "import lory.cli, sys; print([name for name in ('gradio', 'pandas', 'torch') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
