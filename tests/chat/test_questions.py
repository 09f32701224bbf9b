"""A file of questions: every answer is there once, in order, whatever comes in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lory import cli
from lory.assistant import Assistant, load
from lory.chat import questions
from lory.chat.questions import Report, answer_file
from lory.cli import talk
from lory.data.sources.config import SourceConfig
from lory.data.sources.read import read_source
from lory.generate import GenerationOptions
from lory.runtime import LoryError, UsageError

OPTIONS = GenerationOptions(max_new_tokens=5)
ABOUT = {"model": "tiny", "weights": ["a"]}


@pytest.fixture(scope="module")
def assistant(tiny_model: Path) -> Assistant:
    return load(tiny_model, "float32")


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Seven questions of uneven lengths."""
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"{'Who ' * (number % 3)}are you {number}?\n" for number in range(7)), encoding="utf-8")
    return path


def ask(assistant: Assistant, asked: Path, output: Path, **changes: Any) -> Report:
    values: dict[str, Any] = {"about": ABOUT, "options": OPTIONS, "batch_size": 2, **changes}
    return answer_file(assistant, asked, output, **values)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_question_has_the_answer_that_the_chat_gives_in_order(
    assistant: Assistant, asked: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    report = ask(assistant, asked, tmp_path / "out.jsonl", progress=lambda *place: seen.append(place), system="Hm.")
    found = lines(tmp_path / "out.jsonl")
    assert [line["number"] for line in found] == [1, 2, 3, 4, 5, 6, 7]
    for line, question in zip(found, asked.read_text().splitlines(), strict=True):
        given = [{"role": "system", "content": "Hm."}, {"role": "user", "content": question}]
        answer = {"role": "assistant", "content": assistant.chat(given, OPTIONS)}
        assert line["messages"] == [*given, answer]
        assert (line["finish_reason"] == "length") is (line["tokens"] == 5)
    assert (report.questions, report.there, report.answered, report.failed) == (7, 0, 7, 0)
    assert report.tokens == sum(line["tokens"] for line in found)
    assert seen[0] == (0, 7)
    assert seen[-1] == (7, 7)


def test_what_was_answered_can_be_learnt(assistant: Assistant, asked: Path, tmp_path: Path) -> None:
    ask(assistant, asked, tmp_path / "out.jsonl")
    data = read_source(SourceConfig(path=str(tmp_path / "out.jsonl")))
    assert len(data.conversations) + sum(data.dropped.values()) == 7
    assert "malformed" not in str(data.dropped)


@pytest.mark.parametrize("sampled", [False, True])
def test_an_interruption_changes_nothing(
    assistant: Assistant, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    options = OPTIONS.model_copy(update={"do_sample": True, "seed": 3}) if sampled else OPTIONS
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    ask(assistant, asked, whole, options=options)
    answer_batch, calls = questions.answer_batch, []

    def break_off(*arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_batch(*arguments)

    monkeypatch.setattr(questions, "answer_batch", break_off)
    with pytest.raises(KeyboardInterrupt):
        ask(assistant, asked, output, options=options)
    assert len(lines(output)) == 4
    # a crash may cut a line off
    output.write_bytes(output.read_bytes() + b'{"number": 7, "mess')
    report = ask(assistant, asked, output, options=options)
    assert (report.there, report.answered) == (4, 3)
    assert sum(calls[3:]) == 3
    assert output.read_text() == whole.read_text()
    again = ask(assistant, asked, output, options=options)
    assert (again.there, again.answered, again.tokens) == (7, 0, 0)
    assert output.read_text() == whole.read_text()


def test_other_settings_are_noticed_and_said(assistant: Assistant, asked: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    ask(assistant, asked, output)
    other = OPTIONS.model_copy(update={"max_new_tokens": 9})
    with pytest.raises(UsageError, match=r"begun with other settings: max_new_tokens \(was 5, is 9\)\. Go on with"):
        ask(assistant, asked, output, options=other)
    with pytest.raises(UsageError, match=r"the weights are not the same; system \(was null, is \"Hm\"\)"):
        ask(assistant, asked, output, system="Hm", about={**ABOUT, "weights": ["b"]})
    asked.write_text(asked.read_text() + "One more?\n")
    with pytest.raises(UsageError, match="the questions are not the same"):
        ask(assistant, asked, output)
    assert len(lines(output)) == 7
    # how many are asked at a time makes no difference
    asked.write_text("".join(asked.read_text().splitlines(keepends=True)[:-1]))
    assert ask(assistant, asked, output, batch_size=4).there == 7


def test_files_that_are_somebody_elses_are_left_alone(assistant: Assistant, asked: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(UsageError, match="not from this command"):
        ask(assistant, asked, output)
    assert output.read_text() == "precious\n"
    with pytest.raises(UsageError, match="for the questions and for the answers"):
        ask(assistant, asked, asked)
    output.unlink()
    ask(assistant, asked, output)
    output.write_text("7\n" + output.read_text())
    with pytest.raises(UsageError, match="line 1 is not what this command writes"):
        ask(assistant, asked, output)


def test_a_question_that_cannot_be_asked_is_told_and_the_rest_answered(assistant: Assistant, tmp_path: Path) -> None:
    asked = tmp_path / "questions.jsonl"
    picture = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    asked.write_text(
        "\n".join(
            json.dumps(question) for question in ["Hi", "Who? " * 400, [{"role": "user", "content": picture}], "You"]
        )
    )
    output = tmp_path / "out.jsonl"
    report = ask(assistant, asked, output, batch_size=8)
    found = lines(output)
    assert (report.answered, report.failed) == (4, 2)
    assert "context ends at 512" in found[1]["error"]
    assert "reads text only" in found[2]["error"]
    assert [line["messages"][-1]["role"] for line in found] == ["assistant", "user", "user", "assistant"]
    assert ask(assistant, asked, output).failed == 2


def test_an_answer_in_the_file_stands_beside_as_the_target(assistant: Assistant, tmp_path: Path) -> None:
    asked = tmp_path / "talks.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked.write_text(json.dumps({"messages": messages}))
    ask(assistant, asked, tmp_path / "out.jsonl")
    (line,) = lines(tmp_path / "out.jsonl")
    assert line["target"] == "Hello"
    assert [message["role"] for message in line["messages"]] == ["user", "assistant"]


def test_retry_and_failures_are_those_of_the_chat(
    assistant: Assistant, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry = OPTIONS.model_copy(update={"on_loop": "retry"})
    ask(assistant, asked, tmp_path / "retry.jsonl", options=retry)
    ask(assistant, asked, tmp_path / "plain.jsonl")
    answers = [[line["messages"] for line in lines(tmp_path / f"{name}.jsonl")] for name in ("retry", "plain")]
    assert answers[0] == answers[1]

    def fail(*_: object) -> None:
        raise LoryError("The answers could not be generated: no memory.")

    monkeypatch.setattr(questions, "answer_batch", fail)
    with pytest.raises(LoryError, match="no memory"):
        ask(assistant, asked, tmp_path / "failed.jsonl")


# The command


@pytest.fixture
def lory_chat(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `lory chat ARGUMENTS`."""
    monkeypatch.setattr(cli, "COMMANDS", (talk.chat, *cli.COMMANDS[:1]))

    def run(*arguments: object, typed: str = "") -> Result:
        return CliRunner().invoke(cli.build_app(), ["chat", *map(str, arguments)], input=typed)

    return run


def test_the_command_answers_a_file_and_tells_of_it(
    lory_chat: Any, tiny_adapter: Path, asked: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = (tiny_adapter, "--prompts", asked, "--output", output, "--conf", "max_new_tokens=4 top_k=3")
    result = lory_chat(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert (report["questions"], report["answered"], report["output"]) == (7, 7, str(output))
    assert report["tokens_per_second"] > 0
    result = lory_chat(*arguments)
    assert result.stdout == f"{output}: 7 questions, 7 of them before\n"
    expected = load(tiny_adapter, "float32").chat("are you 0?", GenerationOptions(max_new_tokens=4))
    assert lines(output)[0]["messages"][-1]["content"] == expected


def test_ctrl_c_is_told_and_is_no_success(
    lory_chat: Any, tiny_model: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(questions, "answer_file", stop)
    assert lory_chat(tiny_model, "--prompts", asked, "--output", tmp_path / "o.jsonl").exit_code == 1


def test_a_pipe_is_answered_with_options_and_adapters(lory_chat: Any, tiny_model: Path, tiny_adapter: Path) -> None:
    options = GenerationOptions(max_new_tokens=3)
    arguments = (tiny_model, "--conf", "max_new_tokens=3", "--adapter", f"one={tiny_adapter}", "--json")
    result = lory_chat(*arguments, typed="Hi\n:clear-history\n:adapter one\nHi\n")
    assert result.exit_code == 0, result.exception
    answers = [json.loads(line)["answer"] for line in result.stdout.splitlines() if line.startswith("{")]
    assert answers == [load(model).chat("Hi", options) for model in (tiny_model, tiny_adapter)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--output", "x.jsonl"], "--output was given without --prompts"),
        (["--prompts", "{asked}"], "--prompts was given without --output"),
        (["--prompts", "missing.txt", "--output", "x.jsonl"], "missing.txt is no file"),
        (["--conf", "temprature=1"], "did you mean 'temperature'"),
        (["--adapter", "polly"], "an adapter is NAME=PATH"),
        (["--adapter", "none=x"], "takes adapters off"),
        (["--adapter", "a=x", "--adapter", "a=y"], "names 'a' twice"),
    ],
)
def test_wrong_usage_is_one_sentence(
    lory_chat: Any, tiny_model: Path, asked: Path, arguments: list[str], problem: str
) -> None:
    error = lory_chat(tiny_model, *(text.format(asked=asked) for text in arguments)).exception
    assert isinstance(error, UsageError), error
    assert problem in str(error)
