"""The chat in a terminal: streaming answers, texts of several lines, and commands that begin with a colon."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from lory.chat.adapters import Adapters
from lory.chat.commands import COMMANDS, Chat, run_command
from lory.chat.pictures import MARK, open_picture
from lory.chat.session import Session
from lory.chat.typed import Lines, Typed, fold, is_open
from lory.generate import GenerationOptions
from lory.runtime import LoryError, UsageError, is_terminal

if TYPE_CHECKING:
    from lory.assistant import Assistant

# A model's output must not move the cursor, rename the window or answer for the keyboard. Controls become their
# pictures (ESC is ␛), those of the upper range, which have none, the replacement character; carriage returns go.
_VISIBLE: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    ord("\r"): None,
}

Ask = Callable[[str], str]
"""Asks for a line; raises EOFError where there is none."""


def run_chat(
    assistant: Assistant,
    system: str | None = None,
    options: GenerationOptions | None = None,
    adapters: Adapters | None = None,
    as_json: bool = False,
) -> int:
    """Chat until the person leaves; returns the exit code.

    In a terminal there are a prompt, completion and a history of lines. Otherwise the lines of standard input are
    taken one by one: answers go to standard output, and what commands and errors say to standard error; the exit code
    tells of errors then.

    Args:
        adapters: those that `:adapter` changes between.
        as_json: print each answer as a JSON object in a line of its own, without a prompt.
    """
    chat = Chat(Session(assistant, system, options), adapters)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte or an emoji must not end the chat
    if sys.stdin.isatty() and is_terminal() and not as_json:
        _talk(chat)
        return 0
    return _read(chat, as_json)


def _talk(chat: Chat) -> None:
    """The chat with a person, who leaves with `:exit` or Ctrl-D; Ctrl-C stops only what is going on."""
    prompt: PromptSession[str] = PromptSession(
        history=InMemoryHistory(),
        completer=_Completer(chat),
        complete_style=CompleteStyle.READLINE_LIKE,
        multiline=True,
        key_bindings=_bind_keys(),
        prompt_continuation=". ",
    )
    _say(f"Chat with {chat.name}. :help lists the commands; :exit or Ctrl-D leaves.", sys.stdout)
    while True:
        try:
            line = prompt.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not prompt.default_buffer.text:
                _say(":exit or Ctrl-D leaves.", sys.stdout)
            continue
        try:
            if not _take(chat, fold(line), _Voice(sys.stdout, f"{chat.name}: "), _ask_person):
                return
        except (KeyboardInterrupt, EOFError):
            _say("(stopped)", sys.stdout)
        except LoryError as error:
            _tell(error, sys.stdout)


def _bind_keys() -> KeyBindings:
    """Enter sends what is whole, and begins a new line otherwise, as Alt-Enter always does."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _ask_person(question: str) -> str:
    session: PromptSession[str] = PromptSession()
    return session.prompt(question)


def _read(chat: Chat, as_json: bool) -> int:
    """The chat with a pipe or a file, one text after the other; the exit code is that of the worst error."""
    lines, code = Lines(), 0
    voice = _Voice(sys.stderr, as_json=as_json)
    while True:
        line = sys.stdin.readline()
        try:
            typed = lines.add(line.removesuffix("\n")) if line else lines.close() if lines.open else None
            if typed is not None and not _take(chat, typed, voice, _ask_pipe):
                return code
        except EOFError:
            _say("An image was asked for, and the input has ended; the question was not sent.", sys.stderr)
            code = UsageError.exit_code
        except LoryError as error:
            _tell(error, sys.stderr)
            code = max(code, error.exit_code)
        if not line:
            return code


def _ask_pipe(question: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


@dataclass(frozen=True)
class _Voice:
    """How the chat speaks."""

    notes: TextIO
    """Where commands speak."""
    lead: str = ""
    """Printed before an answer."""
    as_json: bool = False
    """Answers are JSON objects."""


def _take(chat: Chat, typed: Typed, voice: _Voice, ask: Ask) -> bool:
    """Do what was typed; False if that is to leave."""
    text = typed.text
    if not typed.literal and text.startswith(":") and not text.startswith("::"):
        said = run_command(chat, text)
        if said is None:
            return False
        if isinstance(said, Generator):
            before = chat.session.history[-1]["content"]
            _print_answer(chat, said, voice)
            _note_sameness(chat.session, before)
        elif said:
            _say(said, voice.notes)
    elif text.strip():
        question = text if typed.literal else text.removeprefix(":")
        _ask_for_pictures(chat, question, ask)
        pictures = tuple(chat.pictures)
        _print_answer(chat, chat.session.ask(question, pictures), voice)
        chat.pictures.clear()
    return True


def _ask_for_pictures(chat: Chat, question: str, ask: Ask) -> None:
    """Ask for the images whose marks are in the question and that were not given yet."""
    marks = question.count(MARK) if chat.session.sees_images else 0
    missing = marks - len(chat.pictures)
    for number in range(marks - missing + 1, marks + 1) if missing > 0 else ():
        source = ask(f"image {number} of {marks} (path or URL): ").strip()
        if not source:
            raise UsageError("No image was named; the question was not sent.")
        chat.pictures.append(open_picture(source))


def _print_answer(chat: Chat, answer: Generator[str, None, None], voice: _Voice) -> None:
    """Print the answer as it comes, and end its line however it ends."""
    session = chat.session
    if voice.as_json:
        text = "".join(answer)
        found = {"question": session.history[-2]["content"], "answer": text, "finish_reason": session.ending.reason}
        print(json.dumps(found, ensure_ascii=False), flush=True)
        return
    print(visible(voice.lead), end="", flush=True)
    try:
        with contextlib.closing(answer) as pieces:
            for piece in pieces:
                print(visible(piece), end="", flush=True)
    finally:
        print(flush=True)
    if session.ending.loops:
        ended = "it was ended" if session.ending.reason == "repetition" else "it went on"
        _say(f"(the answer went round in circles; {ended})", sys.stderr)
    elif session.ending.reason == "length":
        _say("(the answer was cut at its longest; :conf max_new_tokens=1000 allows for more)", sys.stderr)


def _note_sameness(session: Session, before: str) -> None:
    """Say why another answer is the one from before, if it is."""
    if session.history[-1]["content"] == before:
        options = session.options
        hint = ":seed none" if options.do_sample and options.seed is not None else ":conf do_sample=true"
        if not options.do_sample or options.seed is not None:
            _say(f"(the same answer as before; {hint} makes others possible)", sys.stderr)


def _tell(error: LoryError, file: TextIO) -> None:
    _say(" ".join(str(error).split()), file)


def _say(text: str, file: TextIO) -> None:
    print(visible(text), file=file, flush=True)


def visible(text: str) -> str:
    """The text without what would act on the terminal."""
    return text.translate(_VISIBLE)


class _Completer(Completer):
    """Tab completes commands and, after `:conf` and `:adapter`, the names of options and adapters."""

    def __init__(self, chat: Chat | None = None) -> None:
        self._chat = chat

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        typed = before.rpartition(" ")[2]
        words: Iterable[str] = ()
        if before.startswith(":conf "):
            words = [f"{option}=" for option in GenerationOptions.model_fields]
        elif before.startswith(":adapter ") and self._chat is not None and self._chat.adapters is not None:
            words = [*self._chat.adapters.names, "none"]
        elif before == typed:
            words = COMMANDS
        return [Completion(word, start_position=-len(typed)) for word in words if word.startswith(typed)]
