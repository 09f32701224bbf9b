"""The commands of the terminal chat: what begins with a colon."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prompt_toolkit.shortcuts import clear

from lory.chat.adapters import Adapters
from lory.chat.conversations import read_talks, save_conversation, to_turns
from lory.chat.pictures import Picture, open_picture
from lory.chat.session import Session
from lory.runtime import UsageError, is_terminal


@dataclass
class Chat:
    """What the commands work on."""

    session: Session
    adapters: Adapters | None = None
    """None: the adapter cannot be changed."""
    pictures: list[Picture] = field(default_factory=list)
    """Those that the next question is about."""
    saved: set[Path] = field(default_factory=set)
    """Files that hold this conversation, and may be written over."""

    @property
    def name(self) -> str:
        """What the assistant is called."""
        return self.session.assistant.name or "assistant"


Said = str | Generator[str, None, None] | None
"""What a command has to say, perhaps nothing (""), or an answer that comes; None if it is to leave."""


def run_command(chat: Chat, text: str) -> Said:
    """Do what a command asks for.

    Raises:
        UsageError: there is no such command, or it cannot do that.
    """
    name, *argument = text.split(maxsplit=1)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else ":help lists the commands."
        raise UsageError(f"Unknown command {name}; {hint} (:: sends a text that begins with a colon.)")
    function, _ = COMMANDS[name]
    return function(chat, "".join(argument))


def _help(chat: Chat, argument: str) -> str:
    lines = [f"{name:<16}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join([*lines, *(f"{name:<16}{line}" for name, line in TYPING.items())])


def _exit(chat: Chat, argument: str) -> None:
    return None


def _clear(chat: Chat, argument: str) -> str:
    if is_terminal():
        clear()
    return ""


def _history(chat: Chat, argument: str) -> str:
    system = chat.session.messages[:1] if chat.session.system is not None else []
    lines = []
    for turn in [*system, *chat.session.history]:
        images = ", ".join(picture.name for picture in turn.get("images", ()))
        lines.append(f"{turn['role']}: {turn['content']}{f' ({images})' if images else ''}")
    return "\n".join(lines) or "Nothing was said."


def _clear_history(chat: Chat, argument: str) -> str:
    chat.session.clear()
    return "The conversation is forgotten."


def _regenerate(chat: Chat, argument: str) -> Generator[str, None, None]:
    return chat.session.regenerate()


def _seed(chat: Chat, argument: str) -> str:
    session = chat.session
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


def _conf(chat: Chat, argument: str) -> str:
    session = chat.session
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


def _reset_conf(chat: Chat, argument: str) -> str:
    chat.session.reset_options()
    return "The decoding options are those that the chat began with."


def _system(chat: Chat, argument: str) -> str:
    session = chat.session
    session.system = argument or None
    said = "The system prompt is set." if argument else "The system prompt is removed."
    return f"{said} The conversation so far is kept; :clear-history forgets it." if session.history else said


def _image(chat: Chat, argument: str) -> str:
    if not chat.session.sees_images:
        raise UsageError(f"{chat.name} reads text only; a model that sees images is needed for :image.")
    if argument == "none":
        chat.pictures.clear()
        return "The next question has no images."
    if argument:
        chat.pictures.append(open_picture(argument))
    names = ", ".join(picture.name for picture in chat.pictures)
    return f"The next question is about {names}." if names else "The next question has no images; :image PATH adds one."


def _adapter(chat: Chat, argument: str) -> str:
    adapters = chat.adapters
    if adapters is None:
        raise UsageError("The adapter cannot be changed here; chat without int8 to be able to.")
    if not argument:
        known = ", ".join(adapters.names) or "none; :adapter PATH adds one"
        return f"The adapter is {adapters.current or 'none'}; there are: {known}."
    if argument != "none" and argument not in adapters.names:
        adapters.add(argument, argument)
    chat.session.assistant = adapters.use(None if argument == "none" else argument)
    said = "The base answers, without an adapter." if argument == "none" else f"The adapter is {argument}."
    return f"{said} The conversation so far is kept; :clear-history forgets it." if chat.session.history else said


def _save(chat: Chat, argument: str) -> str:
    if not argument:
        raise UsageError(":save was given without a file; name one, as in :save talk.json, or talk.jsonl to add to it.")
    if not chat.session.history:
        raise UsageError("Nothing was said yet, so there is nothing to save.")
    path = Path(argument).expanduser()
    if path.suffix.lower() == ".json" and path.exists() and path.absolute() not in chat.saved:
        raise UsageError(f"{path} exists already; choose another name, or a .jsonl file, to which a line is added.")
    system = [] if chat.session.system is None else [{"role": "system", "content": chat.session.system}]
    save_conversation([*system, *chat.session.history], path)
    chat.saved.add(path.absolute())
    return f"The conversation is in {path}."


def _load(chat: Chat, argument: str) -> str:
    name, number = _split_number(argument)
    if not name:
        raise UsageError(
            ":load was given without a file; name one, as in :load talk.json, or talk.jsonl 3 for the third."
        )
    path = Path(name).expanduser()
    if path.suffix.lower() == ".txt":
        raise UsageError(f"{path} was given; a conversation is loaded from a .json or .jsonl file.")
    talks = read_talks(path)
    if number > len(talks):
        raise UsageError(f"{path} has {len(talks)} conversations; there is no number {number}.")
    talk = talks[number - 1]
    messages = list(talk.messages) if talk.answer is None else [*talk.messages, talk.answer]
    if any(message.media for message in messages) and not chat.session.sees_images:
        raise UsageError(f"{talk.where} has images, and {chat.name} reads text only.")
    turns = to_turns(messages, path.absolute().parent)
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
    notes = [f"number {number or len(talks)} of {len(talks)}"] * (len(talks) > 1)
    if turns[-1]["role"] == "user":
        notes.append("its last question, which has no answer, is left out: " + turns.pop()["content"])
    if any(message.reasoning for message in messages):
        notes.append("what the assistant thought is left out")
    chat.session.system, chat.session.history = system, turns
    if path.suffix.lower() == ".json":
        chat.saved.add(path.absolute())
    count = f"{len(turns) // 2} question{'s' * (len(turns) != 2)} with answers"
    return f"The conversation is that of {path}: {'; '.join([count, *notes])}."


def _split_number(argument: str) -> tuple[str, int]:
    """The file, and which of its conversations, counted from 1; 0: the last."""
    name, _, last = argument.rpartition(" ")
    if name and last.isdecimal() and int(last):
        return name.strip(), int(last)
    return argument, 0


COMMANDS: dict[str, tuple[Callable[[Chat, str], Said], str]] = {
    ":help": (_help, "lists the commands"),
    ":exit": (_exit, "leaves, as :quit and Ctrl-D do; Ctrl-C stops an answer"),
    ":quit": (_exit, "leaves"),
    ":clear": (_clear, "clears the screen"),
    ":history": (_history, "prints the conversation"),
    ":clear-history": (_clear_history, "forgets the conversation"),
    ":regenerate": (_regenerate, "answers the last question once more"),
    ":save": (_save, "':save FILE' keeps the conversation in FILE.json, or adds it to FILE.jsonl"),
    ":load": (_load, "':load FILE' goes on with its last conversation, ':load FILE 3' with its third"),
    ":image": (_image, "':image PATH' (or URL, none) shows an image with the next question"),
    ":adapter": (_adapter, "shows the adapters; ':adapter NAME' (or PATH, none) changes it"),
    ":seed": (_seed, "shows the seed of sampling; ':seed 7' sets it, ':seed none' removes it"),
    ":conf": (_conf, "shows the decoding options; ':conf temperature=0.7 top_p=0.9' sets some"),
    ":reset-conf": (_reset_conf, "goes back to the decoding options at the start"),
    ":system": (_system, "':system TEXT' sets the system prompt, ':system' alone removes it"),
}

TYPING: dict[str, str] = {
    "::text": "sends ':text' to the assistant",
    '"""': "begins and ends a text of several lines; Alt-Enter and a last \\ begin a new line",
    "<image>": "in a text: asks for an image's path or URL, if the model sees",
}
