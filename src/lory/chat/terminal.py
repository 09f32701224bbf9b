"""The chat in a terminal: streaming answers, and commands that begin with a colon."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle, clear

from lory.chat.session import Session
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


def run_chat(assistant: Assistant, system: str | None = None, options: GenerationOptions | None = None) -> int:
    """Chat until the person leaves; returns the exit code.

    In a terminal there are a prompt, completion and a history of lines. Otherwise the lines of standard input are
    taken one by one: answers go to standard output, and what commands and errors say to standard error.
    """
    session = Session(assistant, system, options)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte or an emoji must not end the chat
    if sys.stdin.isatty() and is_terminal():
        _talk(session)
    else:
        _read(session)
    return 0


def _talk(session: Session) -> None:
    """The chat with a person, who leaves with `:exit` or Ctrl-D; Ctrl-C stops only what is going on."""
    name = session.assistant.name or "assistant"
    prompt: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=_Completer(), complete_style=CompleteStyle.READLINE_LIKE
    )
    _say(f"Chat with {name}. :help lists the commands; :exit or Ctrl-D leaves.", sys.stdout)
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
            if not _take(session, line, sys.stdout, lead=f"{name}: "):
                return
        except KeyboardInterrupt:
            _say("(stopped)", sys.stdout)


def _read(session: Session) -> None:
    """The chat with a pipe or a file, one line a question."""
    for line in sys.stdin:
        if not _take(session, line, sys.stderr):
            return


def _take(session: Session, line: str, notes: TextIO, lead: str = "") -> bool:
    """Do what a line asks for; False if that is to leave.

    Args:
        notes: where commands and errors speak.
        lead: printed before an answer.
    """
    text = line.strip()
    try:
        if text.startswith(":") and not text.startswith("::"):
            said = _command(session, text)
            if said is None:
                return False
            if said:
                _say(said, notes)
        elif text:
            _answer(session, text.removeprefix(":"), lead)
    except LoryError as error:
        _say(" ".join(str(error).split()), notes)
    return True


def _answer(session: Session, question: str, lead: str) -> None:
    """Print the answer as it comes, and end its line however it ends."""
    print(visible(lead), end="", flush=True)
    try:
        with contextlib.closing(session.ask(question)) as pieces:
            for piece in pieces:
                print(visible(piece), end="", flush=True)
    finally:
        print(flush=True)
    if session.ending.loops:
        ended = "it was ended" if session.ending.reason == "repetition" else "it went on"
        _say(f"(the answer went round in circles; {ended})", sys.stderr)


def _say(text: str, file: TextIO) -> None:
    print(visible(text), file=file, flush=True)


def visible(text: str) -> str:
    return text.translate(_VISIBLE)


def _command(session: Session, text: str) -> str | None:
    """What the command has to say, perhaps nothing (""); None if it is to leave."""
    name, *argument = text.split(maxsplit=1)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else ":help lists the commands."
        raise UsageError(f"Unknown command {name}; {hint} (:: sends a text that begins with a colon.)")
    function, _ = COMMANDS[name]
    return function(session, "".join(argument))


def _help(session: Session, argument: str) -> str:
    lines = [f"{name:<16}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join([*lines, f"{'::text':<16}sends ':text' to the assistant"])


def _exit(session: Session, argument: str) -> None:
    return None


def _clear(session: Session, argument: str) -> str:
    if is_terminal():
        clear()
    return ""


def _history(session: Session, argument: str) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in session.messages) or "Nothing was said."


def _clear_history(session: Session, argument: str) -> str:
    session.clear()
    return "The conversation is forgotten."


def _seed(session: Session, argument: str) -> str:
    if argument == "none":
        session.set_seed(None)
        return "The seed is removed; each answer is drawn anew."
    if argument:
        try:
            session.set_seed(int(argument))
        except ValueError:
            raise UsageError(f"'{argument}' was given; a seed is a whole number, as in :seed 7, or none.") from None
        return f"The seed is {session.seed}.{_note_on_sampling(session, {'seed'})}"
    return "No seed is set." if session.seed is None else f"The seed is {session.seed}; :seed none removes it."


def _conf(session: Session, argument: str) -> str:
    before = session.options.model_dump()
    if not argument:
        return _list_options(before, "\n")
    session.set_options(argument)
    changed = {key: value for key, value in session.options.model_dump().items() if value != before[key]}
    return f"Changed: {_list_options(changed, ' ') or 'nothing'}.{_note_on_sampling(session, set(changed))}"


def _list_options(options: dict[str, Any], separator: str) -> str:
    """The options as `:conf` takes them."""
    return separator.join(f"{key}={json.dumps(value)}" for key, value in options.items())


def _note_on_sampling(session: Session, changed: set[str]) -> str:
    """Says so if what was changed is without effect for now."""
    if session.options.do_sample or not changed & {"temperature", "top_k", "top_p", "min_p", "typical_p", "seed"}:
        return ""
    return " It takes effect with :conf do_sample=true."


def _reset_conf(session: Session, argument: str) -> str:
    session.reset_options()
    return "The decoding options are those that the chat began with."


def _system(session: Session, argument: str) -> str:
    session.system = argument or None
    said = "The system prompt is set." if argument else "The system prompt is removed."
    return f"{said} The conversation so far is kept; :clear-history forgets it." if session.history else said


COMMANDS: dict[str, tuple[Callable[[Session, str], str | None], str]] = {
    ":help": (_help, "lists the commands"),
    ":exit": (_exit, "leaves, as :quit and Ctrl-D do; Ctrl-C stops an answer"),
    ":quit": (_exit, "leaves"),
    ":clear": (_clear, "clears the screen"),
    ":history": (_history, "prints the conversation"),
    ":clear-history": (_clear_history, "forgets the conversation"),
    ":seed": (_seed, "shows the seed of sampling; ':seed 7' sets it, ':seed none' removes it"),
    ":conf": (_conf, "shows the decoding options; ':conf temperature=0.7 top_p=0.9' sets some"),
    ":reset-conf": (_reset_conf, "goes back to the decoding options at the start"),
    ":system": (_system, "':system TEXT' sets the system prompt, ':system' alone removes it"),
}


class _Completer(Completer):
    """Tab completes commands and, after `:conf`, the names of options."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        typed = before.rpartition(" ")[2]
        words: Iterable[str] = ()
        if before.startswith(":conf "):
            words = [f"{option}=" for option in GenerationOptions.model_fields]
        elif before == typed:
            words = COMMANDS
        return [Completion(word, start_position=-len(typed)) for word in words if word.startswith(typed)]
