"""Contrastive search goes on beside the batch, and finds what it finds alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.server.conftest import wait_until
from tests.server.test_engine import GREEDY, Inbox, answer, make_job, start

import lory
from lory.generate import GenerationOptions, decode_text, generate_ids
from lory.runtime import UsageError
from lory.server.catalogue import Catalogue
from lory.server.engine import Engine
from lory.server.jobs import Job
from lory.server.runner import Runner

SEARCH = GenerationOptions(penalty_alpha=0.6, top_k=5)
PROMPT = list(range(40, 60))


@pytest.fixture
def engine(opened: tuple[Catalogue, Runner]) -> Iterator[Engine]:
    engine = start(opened, max_batch=4, kept_tokens=0)
    yield engine
    engine.close()


def find_alone(folder: str, options: GenerationOptions, tokens: int) -> str:
    """What the assistant says, with nobody else in the model."""
    assistant = lory.load(folder)
    own = options.model_copy(update={"max_new_tokens": tokens})
    return decode_text(assistant.tokenizer, generate_ids(assistant.model, PROMPT, own, assistant.terminators))


@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 1.5, "frequency_penalty": 0.5}], ids=str)
def test_a_search_beside_other_answers_finds_what_it_finds_alone(
    opened: tuple[Catalogue, Runner], adapters: dict[str, str], engine: Engine, changes: dict[str, Any]
) -> None:
    options = SEARCH.model_copy(update=changes)
    folders = [opened[0].model.name_or_path, adapters["one"], adapters["three"]]
    expected = [find_alone(folder, options, 25) for folder in folders]
    assert len(set(expected)) == 3
    searches = [make_job(opened[0], PROMPT, 25, options, adapter=adapter) for adapter in (None, 0, 2)]
    greedy = make_job(opened[0], [5, 6, 7], 30, GREEDY, adapter=1, terminators=frozenset({-1}))
    alone = answer(engine, *make_job(opened[0], [5, 6, 7], 30, GREEDY, adapter=1, terminators=frozenset({-1})))
    for job, _ in (greedy, *searches):
        engine.submit(job)
    assert [inbox.read()[0] for _, inbox in searches] == expected
    assert greedy[1].read() == alone


def test_a_search_takes_a_bias_and_stop_strings(opened: tuple[Catalogue, Runner], engine: Engine) -> None:
    from lory.server.sampling import Sampling

    served, inbox = opened[0].list()[0], Inbox()
    sampling = Sampling(SEARCH, {70: 100.0})
    job = Job(PROMPT, served.engine_tokenizer, served.terminators, sampling, 8, inbox.events.put)
    said = answer(engine, job, inbox)[0]
    assert said == served.tokenizer.decode([70] * 8)
    whole = answer(engine, *make_job(opened[0], PROMPT, 20, SEARCH))[0]
    cut = answer(engine, *make_job(opened[0], PROMPT, 20, SEARCH, stops=(whole[4:6],)))
    assert cut == (whole[: whole.index(whole[4:6])], "stop")


def test_a_search_that_nobody_waits_for_leaves_nothing_on_the_model(
    opened: tuple[Catalogue, Runner], engine: Engine
) -> None:
    def count_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in opened[0].model.modules())

    before = count_hooks()
    job, _ = make_job(opened[0], PROMPT, 400, SEARCH, terminators=frozenset({0}))
    engine.submit(job)
    assert wait_until(lambda: job.tokens > 1)
    engine.cancel(job)
    assert wait_until(lambda: engine.is_idle)
    assert job.tokens < 400
    assert wait_until(lambda: count_hooks() == before)


def test_a_search_that_fails_fails_alone(
    opened: tuple[Catalogue, Runner], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy, inbox = make_job(opened[0], [5, 6, 7], 60, GREEDY, terminators=frozenset({-1}))
    failing = [make_job(opened[0], PROMPT, 9, SEARCH, choices=choices) for choices in (3, 1)]
    errors = [RuntimeError("out of memory"), UsageError("This model keeps no cache.")]

    def fail(*_: Any) -> Iterator[tuple[int, torch.Tensor | None]]:
        raise errors[0]
        yield

    monkeypatch.setattr("lory.server.engine.search_contrastively", fail)
    engine.submit(greedy)
    for (job, _), status in zip(failing, ("500 The model failed", "400 This model keeps no cache"), strict=True):
        assert answer(engine, job, failing[0][1] if job is failing[0][0] else failing[1][1])[1].startswith(status)
        errors.pop(0)
    assert inbox.read()[1] == "length"
