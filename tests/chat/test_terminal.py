"""The terminal chat: each command, what may reach the screen, a pipe, and a person at a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pexpect
import pytest
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lory.chat import commands, terminal
from lory.generate import Ending, GenerationOptions
from lory.runtime import LoryError, UsageError

PROGRAM = """
import time
from lory.chat.terminal import run_chat
from lory.generate import Ending, GenerationOptions

class Polly:
    name = "Polly"
    options = GenerationOptions()

    def stream(self, messages, options=None, ending=None):
        question = messages[-1]["content"]
        if question != "slow":
            yield from ["You said ", question, "."]
            return
        for number in range(3000):
            yield f"word{number} "
            time.sleep(0.02)

raise SystemExit(run_chat(Polly()))
"""

PROMPT = "\x1b\\[\\?2004h"
"""What the terminal is sent when a line can be typed: bracketed paste on."""


class Echo:
    """Repeats the question and the number of messages it was given; `fail` makes it fail after one word."""

    name = "echo"
    options = GenerationOptions()

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        options: GenerationOptions | None = None,
        ending: Ending | None = None,
    ) -> Iterator[str]:
        if messages[-1]["content"] == "fail":
            yield "Well"
            raise LoryError("The device is\nout of memory.")
        yield f"{len(messages)} "
        yield messages[-1]["content"]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Chats over the given lines up to an exit code; returns what went to standard output and to standard error."""

    def run(*lines: str, code: int = 0, assistant: object = None, **arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert terminal.run_chat(assistant or Echo(), **arguments) == code
        return capsys.readouterr()

    return run


def test_a_pipe_gets_answers_only(pipe) -> None:
    assert pipe("hi", "you") == ("1 hi\n3 you\n", "")


@pytest.mark.parametrize("leave", [":exit", ":quit", "  :exit  "])
def test_lines_after_exit_are_not_read(pipe, leave: str) -> None:
    assert pipe("hi", leave, "you") == ("1 hi\n", "")


def test_empty_lines_do_nothing(pipe) -> None:
    assert pipe("", "   ", "\t") == ("", "")


def test_a_last_line_without_newline_is_answered(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert terminal.run_chat(Echo()) == 0
    assert capsys.readouterr().out == "1 hi\n"


def test_two_colons_send_a_text_that_begins_with_one(pipe) -> None:
    assert pipe("::exit", ":::") == ("1 :exit\n3 ::\n", "")


def test_help_has_one_line_for_each_command(pipe) -> None:
    lines = pipe(":help")[1].splitlines()
    assert [line.split()[0] for line in lines] == [*commands.COMMANDS, *commands.TYPING]
    assert all(len(line.split()) > 1 and len(line) < 100 for line in lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [(":hlep", "did you mean :help?"), (":clear-histroy", "did you mean :clear-history?"), (":)", ":help lists")],
)
def test_an_unknown_command_is_not_sent_and_the_nearest_is_named(pipe, line: str, message: str) -> None:
    out, err = pipe(line, code=2)
    assert out == ""
    assert f"Unknown command {line}; " in err
    assert message in err


def test_a_failed_answer_is_one_line_and_the_chat_goes_on(pipe) -> None:
    out, err = pipe("fail", "hi", code=1)
    assert err == "The device is out of memory.\n"
    assert out == "Well\n1 hi\n"


def test_history_prints_the_conversation_and_clear_history_forgets_it(pipe) -> None:
    out, err = pipe("hi", ":history", ":clear-history", "you", system="Be brief.")
    assert err.splitlines()[:3] == ["system: Be brief.", "user: hi", "assistant: 2 hi"]
    assert out == "2 hi\n2 you\n"


def test_clear_clears_the_screen_and_keeps_the_conversation(pipe, monkeypatch) -> None:
    cleared = []
    monkeypatch.setattr(commands, "is_terminal", lambda: True)
    monkeypatch.setattr(commands, "clear", lambda: cleared.append(True))
    assert pipe("hi", ":clear", "you") == ("1 hi\n3 you\n", "")
    assert cleared == [True]


def test_system_sets_and_removes_the_prompt_and_keeps_the_conversation(pipe) -> None:
    out, err = pipe(":system Be brief.", "a", ":system Be long.", ":history", ":system", "b")
    first, second, *history, last = err.splitlines()
    assert first == "The system prompt is set."
    assert second == "The system prompt is set. The conversation so far is kept; :clear-history forgets it."
    assert history == ["system: Be long.", "user: a", "assistant: 2 a"]
    assert last.startswith("The system prompt is removed. The conversation so far is kept")
    assert out == "2 a\n3 b\n"


def test_seed_is_shown_set_and_removed(pipe) -> None:
    asked = (":conf do_sample=true", ":seed", ":seed 7", ":seed", ":seed none", ":seed", ":seed x")
    assert pipe(*asked, code=2)[1].splitlines()[1:] == [
        "No seed is set.",
        "The seed is 7.",
        "The seed is 7; :seed none removes it.",
        "The seed is removed; each answer is drawn anew.",
        "No seed is set.",
        "'x' was given; a seed is a whole number, as in :seed 7, or none.",
    ]


def test_conf_shows_every_option_as_it_is_set(pipe) -> None:
    shown = pipe(":conf")[1].splitlines()
    assert [line.split("=")[0] for line in shown] == list(GenerationOptions.model_fields)
    assert pipe(*(f":conf {line}" for line in shown))[1].splitlines() == ["Changed: nothing."] * len(shown)


def test_conf_sets_several_and_reset_conf_goes_back_to_the_start(pipe) -> None:
    start = GenerationOptions(do_sample=True, top_k=9)
    err = pipe(":conf", ":conf top_k=3 temperature=0.5", ":conf", ":reset-conf", ":conf", options=start)[1]
    size = len(GenerationOptions.model_fields)
    lines = err.splitlines()
    assert lines[size] == "Changed: temperature=0.5 top_k=3."
    assert {"top_k=3", "temperature=0.5"} <= set(lines[size + 1 : 2 * size + 1])
    assert lines[-size:] == lines[:size]


def test_conf_names_the_nearest_option(pipe) -> None:
    assert "did you mean 'temperature'?" in pipe(":conf temprature=0.5", code=2)[1]


@pytest.mark.parametrize("line", [":conf temperature=0.5", ":seed 3"])
def test_an_option_without_effect_says_so(pipe, line: str) -> None:
    assert "do_sample=true" in pipe(line)[1]
    assert "do_sample=true" not in pipe(":conf do_sample=True", line)[1].splitlines()[1]


def test_control_characters_of_an_answer_never_reach_the_terminal(pipe) -> None:
    controls = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])).replace("\n", "")
    out, err = pipe(f"a{controls}b é 你 🦜", ":history")
    for text in (out, err):
        assert not any(sign in text for sign in controls if sign != "\t")
        assert "␛" in text
        assert "b é 你 🦜\n" in text


# Several lines


def test_a_backslash_and_a_block_make_one_question_of_several_lines(pipe) -> None:
    assert pipe("one\\", "two", '"""', ":exit", "", "four", '"""', "five") == (
        "1 one\ntwo\n3 :exit\n\nfour\n5 five\n",
        "",
    )


def test_a_block_that_the_input_leaves_open_is_said_and_not_sent(pipe) -> None:
    out, err = pipe("hi", '"""', "lost", code=2)
    assert out == "1 hi\n"
    assert "was not closed" in err


def test_a_long_line_of_any_script_is_one_question(pipe) -> None:
    question = "你好🦜é " * 20_000
    assert pipe(question)[0] == f"1 {question.strip()}\n"


# Answers as JSON, and cut ones


def test_json_has_an_object_for_each_answer(pipe) -> None:
    out, err = pipe("hi 你", ":seed 1", "fail", "you", code=1, as_json=True)
    found = [json.loads(line) for line in out.splitlines()]
    assert [(item["question"], item["answer"]) for item in found] == [("hi 你", "1 hi 你"), ("you", "3 you")]
    assert "The seed is 1." in err


class Cut(Echo):
    """Is cut at its longest answer."""

    def stream(self, messages: object, options: object = None, ending: Ending | None = None) -> Iterator[str]:
        assert ending is not None
        ending.reason = "length"
        yield "and so"


def test_an_answer_that_was_cut_is_said(pipe) -> None:
    out, err = pipe("hi", assistant=Cut())
    assert out == "and so\n"
    assert "cut at its longest" in err


# Files


def test_a_conversation_is_saved_loaded_and_gone_on_with(pipe, tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    out, err = pipe("hi", f":save {path}", "you", f":save {path}", system="Be brief.")
    assert err.splitlines() == [f"The conversation is in {path}."] * 2
    out, err = pipe(f":load {path}", ":history", "and")
    assert err.splitlines() == [
        f"The conversation is that of {path}: 2 questions with answers.",
        "system: Be brief.",
        "user: hi",
        "assistant: 2 hi",
        "user: you",
        "assistant: 4 you",
    ]
    assert out == "6 and\n"


def test_nothing_is_written_over_unless_it_is_this_conversation(pipe, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("precious")
    assert "exists already" in pipe("hi", f":save {path}", code=2)[1]
    assert path.read_text() == "precious"


def test_of_several_conversations_one_is_loaded(pipe, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    pipe("a", f":save {path}", ":clear-history", "b", f":save {path}")
    assert "number 2 of 2" in pipe(f":load {path}")[1]
    err = pipe(f":load {path} 1", ":history")[1]
    assert "number 1 of 2" in err
    assert "user: a" in err
    assert "no number 3" in pipe(f":load {path} 3", code=2)[1]


def test_a_question_without_answer_is_left_out_when_it_is_loaded(pipe, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"role": "user", "content": "Are you there?"}]))
    out, err = pipe(f":load {path}", "hi")
    assert "its last question, which has no answer, is left out: Are you there?" in err
    assert out == "1 hi\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (":save", "without a file"),
        (":save talk.json", "Nothing was said yet"),
        (":load", "without a file"),
        (":load missing.json", "could not be read"),
        (":load talk.txt", "from a .json or .jsonl file"),
        (":regenerate", "Nothing was asked yet"),
        (":image photo.png", "reads text only"),
        (":adapter", "cannot be changed here"),
    ],
)
def test_what_a_command_cannot_do_is_one_sentence(pipe, line: str, problem: str) -> None:
    out, err = pipe(line, code=2)
    assert out == ""
    assert problem in err
    assert len(err.splitlines()) == 1


def test_regenerate_answers_the_last_question_again(pipe) -> None:
    out, err = pipe("a", "b", ":regenerate", "c", ":conf do_sample=true", ":regenerate", ":seed 3", ":regenerate")
    assert out == "1 a\n3 b\n3 b\n5 c\n5 c\n5 c\n"
    notes = [line for line in err.splitlines() if line.startswith("(")]
    assert [":conf do_sample=true" in note for note in notes] == [True, False]
    assert ":seed none" in notes[1]


# Adapters


class Shelf:
    """Two adapters, each of which has a voice of its own."""

    def __init__(self) -> None:
        self.names, self.current = ["polly"], None

    def add(self, name: str, path: str) -> None:
        if name == "model":
            raise UsageError("'model' is a whole model.")
        self.names.append(name)

    def use(self, name: str | None) -> Echo:
        self.current = name
        voice = Echo()
        voice.name = name or "base"
        return voice


def test_adapters_are_listed_changed_added_and_taken_off(pipe) -> None:
    lines = (":adapter", "hi", ":adapter polly", ":adapter runs/x", ":adapter", ":adapter none", ":adapter model")
    _, err = pipe(*lines, code=2, adapters=Shelf())
    kept = " The conversation so far is kept; :clear-history forgets it."
    assert err.splitlines() == [
        "The adapter is none; there are: polly.",
        f"The adapter is polly.{kept}",
        f"The adapter is runs/x.{kept}",
        "The adapter is runs/x; there are: polly, runs/x.",
        f"The base answers, without an adapter.{kept}",
        "'model' is a whole model.",
    ]


# Images


class Eyes(Echo):
    """Says how many images it was shown with the last question."""

    sees_images = True

    def stream(self, messages: Sequence[Mapping[str, Any]], *_: object) -> Iterator[str]:
        content = messages[-1]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        yield " ".join("[image]" if part["type"] == "image" else part["text"] for part in parts)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.new("RGB", (4, 3), "red").save(tmp_path / "my photo.png")
    return str(tmp_path / "my photo.png")


def test_an_image_is_shown_with_the_next_question_only(pipe, photo: str) -> None:
    out, err = pipe(f":image {photo}", "what?", "why?", ":history", ":image", assistant=Eyes())
    assert out == "[image] what?\nwhy?\n"
    assert err.splitlines()[0] == f"The next question is about {photo}."
    assert f"user: <image>what? ({photo})" in err
    assert err.splitlines()[-1] == "The next question has no images; :image PATH adds one."


def test_a_mark_asks_for_an_image(pipe, photo: str) -> None:
    out, _ = pipe("is <image> like <image>?", photo, photo, "end", assistant=Eyes())
    assert out == "is  [image]  like  [image] ?\nend\n"
    out, _ = pipe(f":image {photo}", "is <image> like <image>?", photo, assistant=Eyes())
    assert out == "is  [image]  like  [image] ?\n"


def test_without_its_image_a_question_is_not_sent(pipe, photo: str) -> None:
    assert "No image was named" in pipe("<image>?", "", code=2, assistant=Eyes())[1]
    assert "the input has ended" in pipe("<image>?", code=2, assistant=Eyes())[1]
    out, err = pipe("<image>?", "missing.png", ":image none", "hi", code=2, assistant=Eyes())
    assert "missing.png' does not exist" in err
    assert out == "hi\n"


def test_a_mark_is_text_for_a_model_that_reads_text_only(pipe) -> None:
    assert pipe("what is <image>?")[0] == "1 what is <image>?\n"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (":he", [":help"]),
        (":clear", [":clear", ":clear-history"]),
        (":adapter po", []),
        (":conf temp", ["temperature="]),
        (":conf seed=1 top_", ["top_k=", "top_p="]),
        (":conf top_k=1", []),
        (":system :he", []),
        ("tell :he", []),
        ("he", []),
    ],
)
def test_tab_completes_commands_and_options(typed: str, expected: list[str]) -> None:
    found = terminal._Completer().get_completions(Document(typed), CompleteEvent())
    assert [completion.text for completion in found] == expected


def test_ctrl_d_leaves_and_an_assistant_without_a_name_still_has_a_voice(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr(Echo, "name", "")
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("hi\r\x04")
        assert terminal.run_chat(Echo()) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["assistant: 1 hi"]


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "polly.py"
    path.write_text(PROGRAM)
    return str(path)


def test_a_real_pipe_is_read_to_its_end(program: str) -> None:
    done = subprocess.run([sys.executable, program], input=b"hi\n\xff\n", capture_output=True, timeout=120, check=True)
    assert done.stdout.decode() == "You said hi.\nYou said \ufffd.\n"


def test_a_person_at_a_terminal(program: str) -> None:
    # nothing here answers the query for the cursor's position, which prompt_toolkit would wait for
    environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    child = pexpect.spawn(sys.executable, [program], encoding="utf-8", timeout=60, env=environment, dimensions=(24, 80))
    try:
        child.expect("Chat with Polly")
        child.expect(PROMPT)
        child.send("hello\r")
        child.expect("Polly: You said hello\\.")
        child.expect(PROMPT)

        child.send("slow\r")
        child.expect("word3 ")
        child.sendintr()
        child.expect(r"\(stopped\)")
        child.expect(PROMPT)
        child.send(":history\r")
        child.expect("user: slow")
        child.expect("assistant: word0 word1 ")
        child.expect(PROMPT)

        child.send(":he\t\r")
        child.expect(":exit +leaves")
        child.expect("::text")
        child.expect(PROMPT)
        child.send(":conf max_\t9\r")
        child.expect("Changed: max_new_tokens=9")
        child.expect(PROMPT)

        child.send("one\\\rtwo\r")
        child.expect("You said one\r\ntwo\\.")
        child.expect(PROMPT)
        child.send('"""\r:exit\x1b\r"""\r')
        child.expect("You said :exit")
        child.expect(PROMPT)
        child.send(":regenerate\r")
        child.expect("You said :exit")
        child.expect(PROMPT)

        child.sendintr()
        child.expect(":exit or Ctrl-D leaves")
        child.expect(PROMPT)
        child.send("unsent")
        child.expect("unsent")
        child.sendintr()
        child.expect(PROMPT)
        child.send(":exit\r")
        child.expect(pexpect.EOF)
        assert "leaves" not in child.before
        assert "You said" not in child.before
    finally:
        child.close()
    assert child.exitstatus == 0
