"""What the engine decodes equals what transformers does alone, whoever else is in the batch and whenever they join."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_circling
from tests.server.conftest import wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

import lory
from lory.data.encoding.templates import render_prompt
from lory.generate import GenerationOptions, decode_text, stream_text
from lory.runtime import UsageError
from lory.server.catalogue import Catalogue, open_catalogue
from lory.server.engine import Engine, Refused
from lory.server.jobs import Event, Failure, Job, Piece
from lory.server.limits import Limits
from lory.server.metrics import ServerMetrics
from lory.server.prompts import read_chat
from lory.server.runner import Prompt, Runner
from lory.server.sampling import Sampling
from lory.server.schema import ChatRequest
from lory.types import Message

QUESTIONS = ("Who are you?", "Name three rivers of Europe, and say where each of them ends.", "Why is the sky blue?")
GREEDY = GenerationOptions(do_sample=False)
WARM = GenerationOptions(do_sample=True, temperature=1.3, top_k=40)


class Inbox:
    """Collects what is told of a job."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def read(self) -> tuple[str, str]:
        """The text of the first answer and why it ended."""
        text = ""
        while True:
            event = self.events.get(timeout=30)
            if isinstance(event, Failure):
                return text, f"{event.status} {event.message}"
            if isinstance(event, Piece) and event.choice == 0:
                text += event.text
                if event.finish_reason:
                    return text, event.finish_reason


def make_job(
    catalogue: Catalogue, prompt: list[int], tokens: int, options: GenerationOptions = GREEDY, **more: Any
) -> tuple[Job, Inbox]:
    """A job, and where its answer comes."""
    served, inbox = catalogue.list()[0], Inbox()
    ends = more.pop("terminators", served.terminators)
    job = Job(prompt, served.engine_tokenizer, ends, Sampling(options), tokens, inbox.events.put, **more)
    return job, inbox


def start(opened: tuple[Catalogue, Runner], **limits: Any) -> Engine:
    """An engine over an opened model."""
    opened[1].clear()
    engine = Engine(opened[1], Limits(**limits), ServerMetrics())
    engine.start()
    return engine


@pytest.fixture
def engine(opened: tuple[Catalogue, Runner]) -> Iterator[Engine]:
    """An engine over the tiny model."""
    engine = start(opened, max_batch=4, kept_tokens=0)
    yield engine
    engine.close()


def answer(engine: Engine, job: Job, inbox: Inbox) -> tuple[str, str]:
    """The answer to a job alone."""
    engine.submit(job)
    return inbox.read()


@pytest.fixture(scope="module")
def real(smollm2: Path) -> tuple[Catalogue, Runner]:
    """SmolLM2."""
    return open_catalogue(str(smollm2), {}, "smollm2")


def generate(catalogue: Catalogue, prompt: list[int], tokens: int) -> str:
    """What transformers' own `generate` says."""
    ids = torch.tensor([prompt])
    model: Any = catalogue.model
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    served = catalogue.list()[0]
    return decode_text(served.tokenizer, [i for i in output[0, len(prompt) :].tolist() if i not in served.terminators])


def test_greedy_answers_equal_generate_alone_and_in_a_batch_that_changes(real: tuple[Catalogue, Runner]) -> None:
    catalogue, _ = real
    tokenizer = catalogue.list()[0].tokenizer
    prompts = [render_prompt(tokenizer, [Message("user", question)]) for question in QUESTIONS]
    sizes = (12, 6, 9)
    expected = [generate(catalogue, prompt, size) for prompt, size in zip(prompts, sizes, strict=True)]
    engine = start(real, max_batch=3, prefill_tokens=7, kept_tokens=0)
    try:
        alone = [answer(engine, *make_job(catalogue, p, size))[0] for p, size in zip(prompts, sizes, strict=True)]
        assert alone == expected
        first, inbox = make_job(catalogue, prompts[0], sizes[0])
        engine.submit(first)
        assert wait_until(lambda: first.tokens > 2)
        # the others join while the first is under way, and one leaves before it ends
        others = [make_job(catalogue, p, size) for p, size in zip(prompts[1:], sizes[1:], strict=True)]
        for job, _inbox in others:
            engine.submit(job)
        texts = [inbox.read()[0], *(inbox.read()[0] for _, inbox in others)]
    finally:
        engine.close()
    assert texts == expected


def test_each_row_has_its_own_options_whatever_the_batch(opened: tuple[Catalogue, Runner], engine: Engine) -> None:
    catalogue = opened[0]
    never = frozenset({-1})
    cases: list[dict[str, Any]] = [
        {"options": WARM, "seed": 1, "adapter": None},
        {"options": WARM, "seed": 1, "adapter": 0},
        {"options": GREEDY, "adapter": 1, "stops": ("e",)},
        {"options": GREEDY.model_copy(update={"repetition_penalty": 1.4}), "adapter": 2},
        {"options": WARM.model_copy(update={"top_k": 0, "top_p": 0.9}), "seed": 7, "adapter": 1},
    ]

    def make(number: int) -> tuple[Job, Inbox]:
        prompt = list(range(20 + number, 30 + 3 * number))
        return make_job(catalogue, prompt, 10 + 5 * number, terminators=never, **cases[number])

    alone = [answer(engine, *make(number)) for number in range(5)]
    together = [make(number) for number in range(5)]
    for job, _ in together:
        engine.submit(job)
    assert [inbox.read() for _, inbox in together] == alone
    assert len({text for text, _ in alone}) == 5


def test_an_adapter_in_a_mixed_batch_says_what_it_says_merged(
    opened: tuple[Catalogue, Runner], adapters: dict[str, str], engine: Engine
) -> None:
    prompt = list(range(40, 60))
    never = frozenset({-1})
    jobs = [
        make_job(opened[0], prompt, 12, adapter=adapter, terminators=never) for adapter in (None, 0, 1, 2)
    ]  # fmt: skip
    for job, _ in jobs:
        engine.submit(job)
    texts = [inbox.read()[0] for _, inbox in jobs]
    base = opened[0].model.name_or_path
    for text, folder in zip(texts, [base, *adapters.values()], strict=True):
        assistant = lory.load(folder)
        ids = lory.generate.generate_ids(
            assistant.model, prompt, GREEDY.model_copy(update={"max_new_tokens": 12}), [10**6]
        )
        assert text == decode_text(assistant.tokenizer, ids)


def test_a_job_that_is_cancelled_frees_its_place(opened: tuple[Catalogue, Runner], engine: Engine) -> None:
    never = frozenset({-1})
    jobs = [make_job(opened[0], [5, 6, 7], 400, terminators=never)[0] for _ in range(6)]
    for job in jobs:
        engine.submit(job)
    assert wait_until(lambda: all(job.tokens > 1 for job in jobs[:4]))
    for job in jobs:
        engine.cancel(job)
    assert wait_until(lambda: engine.is_idle)
    assert engine.runner.rows.lengths == [] == engine.runner.adapters
    assert all(job.tokens < 400 for job in jobs)


def test_a_full_queue_refuses(opened: tuple[Catalogue, Runner]) -> None:
    engine = start(opened, max_batch=1, queue=1)
    try:
        jobs = [make_job(opened[0], [5, 6, 7], 300, terminators=frozenset({-1})) for _ in range(3)]
        for job, _ in jobs[:2]:
            engine.submit(job)
        with pytest.raises(Refused, match="queue is full") as refusal:
            engine.submit(jobs[2][0])
        assert refusal.value.status == 429
        engine.drain()
        with pytest.raises(Refused, match="shutting down"):
            engine.submit(jobs[2][0])
        assert [inbox.read()[1] for _, inbox in jobs[:2]] == ["length", "length"]
    finally:
        engine.close()


def test_time_ends_an_answer_and_a_wait(opened: tuple[Catalogue, Runner]) -> None:
    engine = start(opened, max_batch=1, seconds=0.2, queue_seconds=0.1)
    try:
        jobs = [make_job(opened[0], [5, 6, 7], 10**6, terminators=frozenset({-1})) for _ in range(2)]
        for job, _ in jobs:
            engine.submit(job)
        assert jobs[0][1].read()[1] == "length"
        assert jobs[1][1].read()[1].startswith("503 The request waited too long")
    finally:
        engine.close()


@pytest.mark.parametrize(
    "failure", [RuntimeError("out of memory"), TypeError("no iterator"), IndexError, StopIteration]
)
def test_what_fails_is_told_and_the_engine_goes_on(
    opened: tuple[Catalogue, Runner], engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise failure

    step = engine.runner.step
    monkeypatch.setattr(engine.runner, "step", fail)
    assert answer(engine, *make_job(opened[0], [5, 6, 7], 9))[1] == "500 The model failed; see the server's log."
    monkeypatch.setattr(engine.runner, "step", step)
    assert answer(engine, *make_job(opened[0], [5, 6, 7], 9, terminators=frozenset({-1})))[1] == "length"


@pytest.fixture(scope="module")
def circling(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A model that says the same nine words in turn, for ever, and the words' tokens."""
    folder = tmp_path_factory.mktemp("circling")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    words = make_circling(model, tokenizer)
    model.save_pretrained(folder)
    return folder, words


def test_loops_are_guarded_as_the_assistant_guards_them(circling: tuple[Path, list[int]]) -> None:
    folder, words = circling
    assistant, opened = lory.load(folder), open_catalogue(str(folder), {})
    never, expected, jobs = [10**6], [], []
    for policy in ("off", "report", "stop", "penalize"):
        options = GREEDY.model_copy(update={"max_new_tokens": 100, "on_loop": policy})
        pieces = stream_text(assistant.model, assistant.tokenizer, words[:1], options, never)
        expected.append(("".join(pieces), "length"))
        jobs.append(make_job(opened[0], words[:1], 100, options, terminators=frozenset(never)))
    engine = start(opened, max_batch=4)
    try:
        for job, _ in jobs:
            engine.submit(job)
        assert [inbox.read() for _, inbox in jobs] == expected
    finally:
        engine.close()
    off, report, stop, penalize = (text for text, _ in expected)
    assert off == report != penalize
    assert off.startswith(stop)
    assert len(stop) < len(off) / 2


def test_a_prompt_that_fails_fails_alone(
    opened: tuple[Catalogue, Runner], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, inbox = make_job(opened[0], [5, 6, 7], 100, terminators=frozenset({-1}))
    engine.submit(job)
    assert wait_until(lambda: job.tokens > 1)

    def fail(*_: Any) -> None:
        raise TypeError("'NoneType' object is not an iterator")

    monkeypatch.setattr(engine.runner, "read", fail)
    assert answer(engine, *make_job(opened[0], [5, 6, 7], 9))[1] == "500 The model failed; see the server's log."
    assert inbox.read()[1] == "length"


def test_a_call_is_answered_even_when_the_engine_ends(engine: Engine) -> None:
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(10)

    first = engine.call(wait)
    assert begun.wait(10)
    with engine._wake:
        engine._stopping = True
    # it came before the end was seen
    engine._calls.append((lambda: None, second := Future()))
    go.set()
    first.result(10)
    with contextlib.suppress(Refused):
        second.result(10)
    assert second.done()


def test_an_answer_ends_where_the_assistants_does(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    # the template closes an answer with a mark that the model's files do not name as an end
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|endoftext|>"))
    served = open_catalogue(str(folder), {})[0].list()[0]
    assert set(served.terminators) == set(lory.load(folder).terminators) == {0, 2}


def test_what_a_request_leaves_out_is_the_models_own(opened: tuple[Catalogue, Runner]) -> None:
    own = GenerationOptions(penalty_alpha=0.6, top_k=4, frequency_penalty=0.5, sampling_noise=0.1)
    served = replace(opened[0].list()[0], options=own)

    def read(**more: Any) -> GenerationOptions:
        body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], **more})
        return read_chat(body, served, Limits(), lambda _: None).sampling.options

    assert read() == own
    assert read(frequency_penalty=0) == own.model_copy(update={"frequency_penalty": 0.0})
    assert read(top_k=3) == own.model_copy(update={"top_k": 3})
    drawn = own.model_copy(update={"penalty_alpha": None, "do_sample": True})
    assert read(temperature=0.7) == drawn.model_copy(update={"temperature": 0.7})
    assert read(n=2) == read(temperature=1) == drawn
    assert read(penalty_alpha=0) == own.model_copy(update={"penalty_alpha": None})


def test_an_adapter_that_is_retired_goes_when_its_last_answer_is_done(tiny_model: Path, tiny_adapter: Path) -> None:
    opened = open_catalogue(str(tiny_model), {"one": str(tiny_adapter)}, "tiny")
    engine = start(opened)
    try:
        job, inbox = make_job(opened[0], [5, 6, 7], 50, adapter=0, terminators=frozenset({-1}))
        engine.submit(job)
        engine.retire(0)
        assert inbox.read()[1] == "length"
        assert engine.runner.bank is not None
        assert wait_until(lambda: 0 not in engine.runner.bank)
        with pytest.raises(Refused, match="removed"):
            engine.submit(job)
    finally:
        engine.close()


def test_a_long_prompt_does_not_hold_up_the_others(opened: tuple[Catalogue, Runner]) -> None:
    engine = start(opened, max_batch=2, prefill_tokens=4, kept_tokens=0)
    seen: list[int] = []
    try:
        running, _ = make_job(opened[0], [5, 6, 7], 10**6, terminators=frozenset({-1}))
        engine.submit(running)
        assert wait_until(lambda: running.tokens > 5)
        long, inbox = make_job(opened[0], list(range(3, 303)), 1)
        read = engine.runner.read

        def note(prompt: Prompt, tokens: int) -> None:
            seen.append(running.tokens)
            read(prompt, tokens)

        engine.call(lambda: setattr(engine.runner, "read", note)).result()
        engine.submit(long)
        inbox.read()
        engine.cancel(running)
        engine.call(lambda: delattr(engine.runner, "read")).result()
    finally:
        engine.close()
    # 300 tokens in parts of 4, with one of the other's tokens between each two parts
    assert len(seen) == 75
    assert [b - a for a, b in pairwise(seen)] == [1] * 74


@pytest.mark.parametrize("family", ["Gemma2", "GPT2", "Mistral", "Qwen3"])
def test_other_models_are_batched_through_their_own_forward(random_model: Any, family: str) -> None:
    sizes = {"sliding_window": 6} if family in ("Gemma2", "Mistral") else {}
    if family == "GPT2":
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    Runner(random_model(family, **sizes)).check()


def test_a_model_with_another_state_is_refused(random_model: Any) -> None:
    model = random_model("Mamba", state_size=4, conv_kernel=3)
    with pytest.raises(UsageError, match="MambaForCausalLM"):
        Runner(model).check()


def test_the_thread_ends(engine: Engine) -> None:
    engine.close()
    assert "lory-engine" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(Refused):
        engine.call(lambda: None)
