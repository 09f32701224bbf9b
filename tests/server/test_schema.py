"""Whatever fits the server's own description of its requests, or does not, is answered, never with a 5xx."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.server.conftest import Server

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.parametrize(("mode", "examples"), [("POSITIVE", 60), ("NEGATIVE", 60)])
def test_every_request_is_answered(server: Server, mode: str, examples: int) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(described)
    statuses = set()

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def ask(case: Any) -> None:
        answer = case.call(base_url=server.url, timeout=30)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

    ask()
    assert 400 in statuses
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.engine.is_idle


def test_the_description_names_the_errors(server: Server) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    for operations in described["paths"].values():
        for operation in operations.values():
            assert {"400", "401", "429", "503"} <= operation["responses"].keys()
            assert "422" not in operation["responses"]
