"""Self-instruct: what is asked, what is taken, and that no reply is paid for twice, whatever breaks in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.data.chat_api import ChatApi, completion, is_prompt, serve, shown_examples, write_instruction, write_reply

from lory.data.making.completions import Api, read_completion
from lory.data.making.self_instruct import Recipe, Tally, generate, parse_instructions, read_seeds
from lory.data.sources.read import SourceConfig, read_source
from lory.runtime import LoryError, UsageError

pytest.importorskip("openai")
SEEDS = tuple(f"Seed {word}, and say why." for word in ("one", "two", "three", "four", "five", "six", "seven", "eight"))
SOON = {"retry-after-ms": "10"}


@pytest.fixture
def api() -> Iterator[ChatApi]:
    with serve() as served:
        yield served


@pytest.fixture
def make(api: ChatApi, tmp_path: Path) -> Callable[..., Tally]:
    """Generate into `tmp_path`/new.jsonl; keywords change the recipe, and `api_...` those of the API."""

    def run(count: int = 20, out: str = "new.jsonl", concurrency: int = 8, **changes: Any) -> Tally:
        own = {name.removeprefix("api_"): value for name, value in changes.items() if name.startswith("api_")}
        rest = {name: value for name, value in changes.items() if not name.startswith("api_")}
        settings = {"url": api.url, "model": "parrot", "timeout_seconds": 5, "retries": 3, **own}
        return generate(Api(**settings), Recipe(SEEDS, count, **rest), tmp_path / out, concurrency)

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def paid_twice(api: ChatApi) -> list[str]:
    return [prompt for prompt, times in api.answered.items() if times > 1]


# What comes out


def test_as_many_records_come_out_as_asked_and_lory_reads_them(make: Callable[..., Tally], tmp_path: Path) -> None:
    tally = make(20)
    data = read_source(SourceConfig(path=str(tmp_path / "new.jsonl")))
    assert len(data.conversations) == tally.accepted == 20
    assert data.dropped == {}
    for conversation in data.conversations:
        question, answer = conversation.messages
        assert answer.content == write_reply(question.content)


def test_prompts_show_six_seeds_and_two_new_instructions(make: Callable[..., Tally], api: ChatApi) -> None:
    make(20)
    prompts = [messages[-1]["content"] for messages in api.asked if is_prompt(messages[-1]["content"])]
    shown = [[example in SEEDS for example in shown_examples(prompt)] for prompt in prompts]
    assert [sum(seeds) for seeds in shown] == [8] + [6] * (len(prompts) - 1)
    assert {len(seeds) for seeds in shown} == {8}


def test_the_settings_reach_the_api(make: Callable[..., Tally], api: ChatApi, tmp_path: Path) -> None:
    make(2, system="Be brief.", language="Welsh", api_temperature=0.3, api_max_tokens=99)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in api.bodies} == {("parrot", 0.3, 99)}
    assert "in this language: Welsh" in api.asked[0][-1]["content"]
    system = {"role": "system", "content": "Be brief."}
    assert [messages[0] for messages in api.asked[1:]] == [system, system]
    assert [record["messages"][0] for record in read(tmp_path / "new.jsonl")] == [system, system]


def test_no_more_answers_are_asked_for_than_are_wanted(make: Callable[..., Tally], api: ChatApi) -> None:
    make(3)
    assert len(api.questions()) == 3


def test_the_result_does_not_depend_on_how_many_calls_run_at_once(
    make: Callable[..., Tally], api: ChatApi, tmp_path: Path
) -> None:
    make(20, out="one.jsonl", concurrency=1)
    assert api.most_at_once == 1
    make(20, out="many.jsonl", concurrency=16)
    assert 1 < api.most_at_once <= 16
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "many.jsonl").read_text()


def test_tokens_and_calls_are_counted(make: Callable[..., Tally], api: ChatApi) -> None:
    tally = make(10)
    assert tally.asked == len(api.asked)
    assert (tally.prompt_tokens, tally.completion_tokens) == (10 * tally.asked, 5 * tally.asked)


# What is not taken


def test_near_duplicates_are_left_out_and_counted(make: Callable[..., Tally], api: ChatApi, tmp_path: Path) -> None:
    def write(prompt: str) -> str:
        if not is_prompt(prompt):
            return write_reply(prompt)
        seed = SEEDS[0].upper().rstrip(".")
        new = write_instruction(prompt)
        return json.dumps([seed, new, f"Please {new}", f"{new}!!"])

    api.write = write
    tally = make(3)
    records = read(tmp_path / "new.jsonl")
    assert tally.rejected["near duplicate"] >= 3 * 3 - 3
    assert len({record["messages"][0]["content"] for record in records}) == 3
    assert not any("Please" in record["messages"][0]["content"] for record in records)


@pytest.mark.parametrize(
    ("answer", "finish_reason", "reason"),
    [
        ("  ", "stop", "empty answer"),
        ("As an AI language model, I have no taste.", "stop", "refusal"),
        ("I’m sorry, but I can’t help with that.", "stop", "refusal"),
        ("It depends on the", "length", "unfinished answer (--max-tokens)"),
        ("There are three reasons:", "stop", "unfinished sentence"),
        ("```python\nprint(1)", "stop", "unfinished sentence"),
        ("It is so. " * 8, "stop", "repetitive answer"),
        ("Yes.", "stop", "too short an answer"),
        ("word " * 60, "stop", "too long an answer"),
        ("Half a \ud83d sign.", "stop", "characters that are no text"),
        ("Half of it.", "content_filter", "answer stopped by the API's content filter"),
        (None, "stop", "answer equals its question"),
    ],
)
def test_unfit_answers_are_counted_by_reason(
    make: Callable[..., Tally], api: ChatApi, answer: str | None, finish_reason: str, reason: str
) -> None:
    unfit: list[str] = []

    def write(prompt: str) -> str:
        if is_prompt(prompt) or unfit:
            api.finish_reason = "stop"
            return write_reply(prompt)
        unfit.append(prompt)
        api.finish_reason = finish_reason
        return prompt.upper() if answer is None else answer

    api.write = write
    # the server's reply and its finish reason belong together
    tally = make(3, answer_words=(2, 50), concurrency=1)
    assert tally.accepted == 3
    assert dict(tally.rejected) == {reason: 1}


def test_unfit_instructions_are_counted_by_reason(make: Callable[..., Tally], api: ChatApi) -> None:
    odd = ["", "Half a \ud83d sign is here", "Go on", "word " * 151, "Sing la la la. " * 8]
    api.write = lambda prompt: (
        write_reply(prompt) if not is_prompt(prompt) else json.dumps([*odd, write_instruction(prompt)])
    )
    tally = make(1)
    names = (
        "empty instruction",
        "characters that are no text",
        "too short an instruction",
        "too long an instruction",
        "repetitive instruction",
    )
    assert dict(tally.rejected) == dict.fromkeys(names, 1)


def test_a_reply_without_a_list_is_counted(make: Callable[..., Tally], api: ChatApi) -> None:
    replies = iter(["I would rather not."])
    api.write = lambda prompt: next(replies, write_reply(prompt))
    assert dict(make(1).rejected) == {"no list of instructions in the reply": 1}


def test_an_api_that_only_repeats_itself_is_not_asked_for_ever(
    make: Callable[..., Tally], api: ChatApi, tmp_path: Path
) -> None:
    api.write = lambda prompt: '["Name the colours of a rainbow."]' if is_prompt(prompt) else "Red, blue and so on."
    with pytest.raises(LoryError, match=r"nothing that is new and fit \(near duplicate: \d+\).*1 of 5 records are in"):
        make(5)
    assert len(read(tmp_path / "new.jsonl")) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('["One", "Two"]', ["One", "Two"]),
        ('Here they are:\n```json\n[\n "One",\n "Two"\n]\n```', ["One", "Two"]),
        ('[{"instruction": "One"}, {"id": 2, "task": "Two"}, 3]', ["One", "Two"]),
        ('["One", "Two", "Thr', ["One", "Two"]),
        ('["One\nline"]', ["One\nline"]),
        ("1. One\n2. Two\n   lines", ["One", "Two lines"]),
        ("Sure!\n1) One [sic]\n2) Two", ["One [sic]", "Two"]),
        ("- One\n- Two", ["One", "Two"]),
        ("I cannot do that.", []),
        ("", []),
    ],
)
def test_instructions_are_found_in_whatever_a_model_writes(text: str, found: list[str]) -> None:
    assert list(parse_instructions(text)) == found


# What breaks


def test_busy_and_broken_servers_are_asked_again(make: Callable[..., Tally], api: ChatApi) -> None:
    api.faults = [
        (429, {"retry-after": "0.05"}, b'{"error": {"message": "slow down"}}'),
        (500, SOON, b"<html>oops</html>"),
        "hang up",
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, b'{"choices": []}'),
        (503, SOON, b""),
    ]
    tally = make(8, concurrency=1)
    assert tally.accepted == 8
    assert len(api.asked) == tally.asked + 6
    assert paid_twice(api) == []


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"does not accept the key.*\(401\)\.$"),
        (403, r"forbids this key to use 'parrot'.*\(403\)\.$"),
        (404, r"knows no 'parrot'.*\(404\)\.$"),
        (400, r"refuses the request \(400\): no such field$"),
    ],
)
def test_a_refusal_ends_it_at_once(
    make: Callable[..., Tally], api: ChatApi, tmp_path: Path, status: int, says: str
) -> None:
    api.faults = [(status, {}, b'{"error": {"message": "no such field."}}')] * 9
    with pytest.raises(UsageError, match=says):
        make(5)
    assert len(api.asked) == 1
    assert not (tmp_path / "new.jsonl").exists()
    # nothing was paid for, so another model may be tried under the same name
    api.faults = []
    assert make(1, api_model="other").accepted == 1


def test_a_single_question_that_the_api_refuses_is_counted(make: Callable[..., Tally], api: ChatApi) -> None:
    make(1, out="other.jsonl")
    api.on_answer = lambda count: api.faults.append((400, {}, b'{"error": "content"}')) if count == 2 else None
    tally = make(3, concurrency=1)
    assert tally.accepted == 3
    assert dict(tally.rejected) == {"question refused by the API": 1}


def test_a_server_that_stays_away_is_named_and_what_came_is_kept(
    make: Callable[..., Tally], api: ChatApi, tmp_path: Path
) -> None:
    def break_down(count: int) -> None:
        if count == 5:
            api.faults = [(503, SOON, b'{"error": {"message": "overloaded"}}')] * 40

    api.on_answer = break_down
    with pytest.raises(LoryError, match=r"failed 4 times \(503\): overloaded\..* run the same command to go on"):
        make(8, concurrency=1)
    api.faults = []
    tally = make(8)
    assert tally.accepted == len(read(tmp_path / "new.jsonl")) == 8
    assert tally.replayed == 6
    assert paid_twice(api) == []


def test_a_server_that_is_not_there_is_named(make: Callable[..., Tally]) -> None:
    with pytest.raises(LoryError, match=r"127\.0\.0\.1:9/v1 cannot be reached \(1 tries\)"):
        make(1, api_url="http://127.0.0.1:9/v1", api_retries=0)


def test_a_server_that_says_nothing_is_given_up(make: Callable[..., Tally], api: ChatApi) -> None:
    done = threading.Event()
    api.write = lambda prompt: str(done.wait(3))
    with pytest.raises(LoryError, match="did not answer in time"):
        make(1, api_timeout_seconds=0.1, api_retries=0)
    done.set()


def test_the_key_is_sent_and_never_shown(make: Callable[..., Tally], api: ChatApi, tmp_path: Path) -> None:
    api.key = "sk-right"
    assert make(1, api_key="sk-right").accepted == 1
    assert "sk-right" not in repr(Api("http://a/v1", "m", "sk-right"))
    with pytest.raises(UsageError) as caught:
        make(1, out="other.jsonl", api_key="sk-wrong")
    assert "sk-" not in str(caught.value)
    api.faults = [(418, {}, b'{"error": {"message": "a teapot for sk-wrong"}}')]
    with pytest.raises(UsageError, match=r"a teapot for \*\*\*$"):
        make(1, out="third.jsonl", api_key="sk-wrong")
    assert not any("sk-" in path.read_text() for path in tmp_path.iterdir())


# Going on


def test_a_run_that_is_whole_asks_nothing(make: Callable[..., Tally], api: ChatApi, tmp_path: Path) -> None:
    make(10)
    before, calls = (tmp_path / "new.jsonl").read_text(), len(api.asked)
    tally = make(10)
    assert len(api.asked) == calls
    assert (tally.asked, tally.replayed) == (0, calls)
    assert (tmp_path / "new.jsonl").read_text() == before


def test_a_larger_count_goes_on_and_equals_one_run(make: Callable[..., Tally], api: ChatApi, tmp_path: Path) -> None:
    make(10)
    make(20)
    assert paid_twice(api) == []
    make(20, out="whole.jsonl")
    assert (tmp_path / "new.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_line_that_was_cut_off_is_asked_again(make: Callable[..., Tally], api: ChatApi, tmp_path: Path) -> None:
    make(10, concurrency=1)
    journal = tmp_path / "new.jsonl.journal"
    before = journal.read_bytes()
    journal.write_bytes(before[:-9])
    calls = len(api.asked)
    assert make(10).asked == 1
    assert len(api.asked) == calls + 1
    assert journal.read_bytes() == before


def test_other_settings_are_refused(make: Callable[..., Tally]) -> None:
    make(1)
    with pytest.raises(UsageError, match=r"other settings: model \(was \"parrot\", is \"owl\"\); go on with the old"):
        make(1, api_model="owl")


def test_a_damaged_journal_is_named(make: Callable[..., Tally], tmp_path: Path) -> None:
    make(1)
    journal = tmp_path / "new.jsonl.journal"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], "}{", *lines[1:]]) + "\n")
    with pytest.raises(UsageError, match=r"new\.jsonl\.journal, line 2 is not what this journal holds"):
        make(1)


def test_a_file_of_somebody_else_is_not_overwritten(make: Callable[..., Tally], tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"new\.jsonl exists already, without a journal"):
        make(1)
    assert (tmp_path / "new.jsonl").read_text() == "mine"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_what_was_stopped_goes_on_without_paying_twice(
    make: Callable[..., Tally], api: ChatApi, tmp_path: Path, how: signal.Signals
) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"instruction": seed, "output": "x"}) + "\n" for seed in SEEDS))
    command = ["data", "generate", "--api", api.url, "--model", "parrot", "--seeds", str(seeds), "-n", "16"]
    command = [sys.executable, "-m", "lory.cli", *command, "--out", str(tmp_path / "a.jsonl"), "--concurrency", "1"]
    reached, gone = threading.Event(), threading.Event()

    def stop(count: int) -> None:
        if count == 9:
            reached.set()
            gone.wait(20)  # this reply never gets there

    api.on_answer = stop
    environment = {**os.environ, "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert reached.wait(60)
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    gone.set()
    records = tmp_path / "a.jsonl"
    if how == signal.SIGINT:
        assert process.returncode == 1
        assert "Stopped. " in err
        assert "of 16 records are in" in err
        assert "run the same command to go on" in err
        assert 0 < len(read(records)) < 16
    else:
        assert not records.exists()
    lost = api.asked[-1][-1]["content"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["replayed"] == 9
    assert len(read(records)) == 16
    assert paid_twice(api) == [lost]
    make(
        16,
        out="whole.jsonl",
    )
    assert [record["messages"][1] for record in read(tmp_path / "whole.jsonl")] == [
        r["messages"][1] for r in read(records)
    ]


# Seeds


def test_seeds_are_the_first_questions_of_any_data(tmp_path: Path) -> None:
    path = tmp_path / "seeds.json"
    chat = [("human", "First?"), ("gpt", "Yes."), ("human", "Second?"), ("gpt", "No.")]
    turns = [{"from": role, "value": text} for role, text in chat]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns}]))
    assert read_seeds(str(path)) == ("First?",)
    assert len(read_seeds("general")) > 100


def test_data_without_questions_give_no_seeds(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("Once upon a time.")
    with pytest.raises(UsageError, match="has no instruction to start from"):
        read_seeds(str(tmp_path / "seeds.txt"))


def test_a_reply_may_lack_what_it_need_not_have() -> None:
    bare = read_completion('{"choices": [{"message": {"content": null}}]}')
    assert bare is not None
    assert (bare.text, bare.finish_reason, bare.prompt_tokens) == ("", "stop", 0)
    whole = read_completion(completion("Hi.", "length").decode())
    assert whole is not None
    assert (whole.text, whole.finish_reason, whole.completion_tokens) == ("Hi.", "length", 5)
