"""Many clients, some of whom hang up: nobody keeps a place, and what is too much is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable

import httpx
from tests.server.conftest import Server, wait_until

Serve = Callable[..., contextlib.AbstractContextManager[Server]]


def body(tokens: int, stream: bool = True) -> dict[str, object]:
    """A request for an answer of so many tokens; the end of sequence is ruled out."""
    messages = [{"role": "user", "content": "Go on."}]
    return {"messages": messages, "max_tokens": tokens, "stream": stream, "logit_bias": {"2": -100}, "temperature": 1}


async def read(client: httpx.AsyncClient, url: str, number: int) -> int:
    """One client: every third hangs up after a few chunks or while it waits; the status it got."""
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body(20, stream=number % 2 == 0)) as answer:
        if answer.status_code == 200 and number % 3 == 0:
            async for _ in answer.aiter_raw():
                break
        else:
            await answer.aread()
        return answer.status_code


async def crowd(url: str, clients: int) -> Counter[int]:
    """What `clients` at a time are answered; one that hangs up while it waits is a 499."""

    async def run(number: int) -> int:
        timeout = 0.3 if number % 6 == 3 else 60
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            try:
                return await read(client, url, number)
            except httpx.ReadTimeout:
                return 499

    return Counter(await asyncio.gather(*(run(number) for number in range(clients))))


def test_forty_clients_leave_nothing_behind(serve: Serve) -> None:
    with serve(max_batch=4, queue=20, step_seconds=0.003) as server:
        statuses = asyncio.run(crowd(server.url, 40))
        assert statuses.keys() <= {200, 429, 499}
        assert statuses[429] >= 1
        assert statuses[200] >= 20
        assert wait_until(lambda: server.engine.is_idle)
        assert server.engine.runner.rows.lengths == []
        assert server.read_metric("lory_running") == server.read_metric("lory_queue_length") == 0
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body(2, stream=False)).status_code == 200


def test_a_client_that_hangs_up_frees_its_place_at_once(serve: Serve) -> None:
    for stream in (True, False):
        with serve(max_batch=1, queue=1, step_seconds=0.02) as server:

            async def leave(url: str = f"{server.url}/v1/chat/completions", stream: bool = stream) -> None:
                async with httpx.AsyncClient(timeout=0.3) as client:
                    with contextlib.suppress(httpx.ReadTimeout):
                        async with client.stream("POST", url, json=body(400, stream)) as answer:
                            async for _ in answer.aiter_raw():
                                return

            asyncio.run(leave())
            assert wait_until(lambda: server.engine.is_idle, 2)
            assert server.read_metric("lory_answer_tokens_total") < 400


def test_a_full_server_says_when_to_come_back(serve: Serve) -> None:
    with serve(max_batch=1, queue=0, step_seconds=0.01) as server, httpx.Client() as client:
        url = f"{server.url}/v1/chat/completions"
        with client.stream("POST", url, json=body(400)) as first:
            lines = first.iter_lines()
            next(lines)
            refused = httpx.post(url, json=body(1))
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) > 0
            assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_reader_that_does_not_read_holds_up_nobody(serve: Serve) -> None:
    with serve(max_batch=2) as server, httpx.Client() as slow:
        url = f"{server.url}/v1/chat/completions"
        with slow.stream("POST", url, json={**body(400), "logprobs": True, "top_logprobs": 20}) as unread:
            assert unread.status_code == 200
            for _ in range(3):
                assert httpx.post(url, json=body(5, stream=False), timeout=5).status_code == 200
            lines = list(unread.iter_lines())
        assert lines[-2] == "data: [DONE]"
        assert json.loads(lines[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
