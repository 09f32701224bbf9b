"""The review queue: answers that something was odd about, and what a person decided about each.

A queue is a file of one JSON object a line that is only ever appended to: an item, or a decision about one. A line that
a crash cut off is passed over, and the last decision about an item counts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lory.metrics.parroting import find_repeated_sentence, find_word_run
from lory.metrics.words import split_words
from lory.runtime import UsageError, explain_os_error, is_terminal, lock_file, write_text
from lory.types import ROLES

if TYPE_CHECKING:
    from rich.console import Console

Decision = Literal["accept", "edit", "reject"]
DECISIONS: tuple[str, ...] = get_args(Decision)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ReviewItem:
    """An answer to be looked at."""

    prompt: Sequence[Mapping[str, Any]]
    """The messages it answers, ``{"role": ..., "content": ...}`` each."""
    answer: str
    reason: str = ""
    """Why it is here."""
    scores: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    time: str = field(default_factory=_now)
    """When it was put here, in ISO 8601."""

    @property
    def id(self) -> str:
        """The same for the same answer to the same prompt, which is looked at once."""
        text = json.dumps([[dict(message) for message in self.prompt], self.answer], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reviewed:
    """An item and what was decided about it."""

    item: ReviewItem
    decision: Decision | None = None
    text: str = ""
    """The answer in its stead, if it was edited."""

    @property
    def answer(self) -> str:
        """The answer as it is to be learnt."""
        return self.text if self.decision == "edit" else self.item.answer


def enqueue(path: Path, item: ReviewItem) -> None:
    """Append an item to a queue; several processes may do so at once.

    Raises:
        UsageError: it has no prompt, or one that is no list of messages.
        LoryError: the file cannot be written.
    """
    value = {"item": {"id": item.id, **asdict(item)}}
    _parse_item(value["item"], "The item for the review queue")
    _append(path, value)


def pending(path: Path) -> list[ReviewItem]:
    """The items that nothing was decided about, oldest first.

    Raises:
        UsageError: there is no such file, or it is no review queue.
    """
    return [reviewed.item for reviewed in read_queue(path) if reviewed.decision is None]


def decide(path: Path, id: str, decision: Decision, text: str = "") -> None:
    """Append what was decided about the item `id`; it is on the disk when this returns.

    Args:
        text: the answer as it should have been, for `edit`.

    Raises:
        UsageError: no such item or decision, or an edit without its text.
        LoryError: the file cannot be written.
    """
    if decision not in DECISIONS:
        raise UsageError(f"'{decision}' was given; a decision is one of {', '.join(DECISIONS)}.")
    if (decision == "edit") != bool(text.strip()):
        raise UsageError("An edit comes with the edited answer, and no other decision does.")
    if all(reviewed.item.id != id for reviewed in read_queue(path)):
        raise UsageError(f"{path} has no item '{id}'.")
    _append(path, {"decision": decision, "id": id, "text": text, "time": _now()})


def read_queue(path: Path) -> list[Reviewed]:
    """All items in their order, each once, with the last decision about it.

    Raises:
        UsageError: there is no such file, or it is no review queue.
    """
    items: dict[str, Reviewed] = {}
    for number, value in _read_lines(path):
        where = f"{path}, line {number}"
        if isinstance(value, dict) and "item" in value:
            item = _parse_item(value["item"], where)
            items.setdefault(item.id, Reviewed(item))
        elif isinstance(value, dict) and value.get("decision") in DECISIONS and value.get("id") in items:
            item = items[value["id"]].item
            items[item.id] = Reviewed(item, value["decision"], str(value.get("text", "")))
        else:
            raise UsageError(f"{where} is neither an item nor a decision about one before it; remove the line.")
    return list(items.values())


def count_decisions(path: Path) -> dict[str, int]:
    """How many items there are of each decision, and ``pending``."""
    counts: Counter[str] = Counter(reviewed.decision or "pending" for reviewed in read_queue(path))
    return {name: counts[name] for name in ("pending", *DECISIONS)}


def export_answers(path: Path, target: Path) -> int:
    """Write accepted and edited answers as training data, in the format `messages`; returns how many.

    Raises:
        UsageError: `target` exists, or there are none.
    """
    good = [reviewed for reviewed in read_queue(path) if reviewed.decision in ("accept", "edit")]
    answers = [{"role": "assistant", "content": reviewed.answer} for reviewed in good]
    records = [{"messages": [*r.item.prompt, answer]} for r, answer in zip(good, answers, strict=True)]
    return _export(records, target, f"{path} has no accepted or edited answer yet.")


def export_preferences(path: Path, target: Path) -> int:
    """Write pairs of a better and a worse answer as training data, in the format `preference`; returns how many.

    An edited answer is better than what it was before; an accepted or edited one is better than each that was rejected
    for the same prompt.

    Raises:
        UsageError: `target` exists, or there are none.
    """
    by_prompt: dict[str, list[Reviewed]] = {}
    for reviewed in read_queue(path):
        by_prompt.setdefault(json.dumps(reviewed.item.prompt, sort_keys=True), []).append(reviewed)
    records = [
        {"prompt": list(good.item.prompt), "chosen": good.answer, "rejected": worse}
        for group in by_prompt.values()
        for good in group
        if good.decision in ("accept", "edit")
        for worse in dict.fromkeys(_list_worse(good, group))
        if worse != good.answer
    ]
    missing = f"{path} has no pair of a better and a worse answer yet: edit an answer, or accept one to a prompt."
    return _export(records, target, missing)


def _list_worse(good: Reviewed, group: Sequence[Reviewed]) -> Iterator[str]:
    if good.decision == "edit":
        yield good.item.answer
    yield from (other.item.answer for other in group if other.decision == "reject")


def _export(records: Sequence[Mapping[str, Any]], target: Path, missing: str) -> int:
    if target.exists():
        raise UsageError(f"{target} exists already; delete it first, or choose another file.")
    if not records:
        raise UsageError(missing)
    write_text(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return len(records)


def _parse_item(value: Any, where: str) -> ReviewItem:
    values = value if isinstance(value, dict) else {}
    prompt, answer = values.get("prompt"), values.get("answer")
    is_list = isinstance(prompt, list | tuple) and bool(prompt)
    messages = cast("Sequence[Any]", prompt) if is_list else ()
    fits = all(isinstance(m, Mapping) and m.get("role") in ROLES and "content" in m for m in messages)
    if not messages or not fits or not isinstance(answer, str):
        raise UsageError(
            f"{where} has no messages under 'prompt', or no text under 'answer', as an item to review has."
        )
    scores = values.get("scores") or {}
    if not isinstance(scores, Mapping) or not all(isinstance(value, int | float) for value in scores.values()):
        raise UsageError(f"{where} has scores that are no numbers by name, such as {{'diversity': 0.5}}.")
    texts = {key: str(values.get(key, "")) for key in ("reason", "model", "time")}
    return ReviewItem(messages, answer, scores=dict(scores), **texts)


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of the whole lines, with their numbers; one that was cut off at the end is passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; a review queue is what `lory eval --review FILE` writes.") from error
    except OSError as error:
        raise UsageError(f"Could not read {path}: {error.strerror}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise UsageError(f"{path}, line {number} is not valid JSON; remove the line.") from error
        yield number, value


def _append(path: Path, value: Mapping[str, Any]) -> None:
    line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
    try:
        with lock_file(path.with_name(f".{path.name}.lock"), wait=True), path.open("a+b") as file:
            _mend_end(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, f"write {path}") from error


def _mend_end(file: Any) -> None:
    """End the file with a whole line: what a crash cut off goes."""
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    content = file.read()
    tail = content.rpartition(b"\n")[2]
    try:
        json.loads(tail)
    except ValueError:
        file.truncate(len(content) - len(tail))
    else:
        file.write(b"\n")


# The terminal


def run_review(path: Path) -> int:
    """Show the pending items one after the other to a person, who decides; returns the exit code.

    What was decided is kept at once, so leaving at any time loses nothing.

    Raises:
        UsageError: there is no terminal, the queue is reviewed in another one, or it is no queue.
    """
    from rich.console import Console

    if not (sys.stdin.isatty() and is_terminal()):
        raise UsageError("A review needs a terminal; --export and --json work without one.")
    console = Console(highlight=False)
    in_use = f"{path} is under review in another terminal; wait until that has ended."
    items = pending(path)
    with lock_file(path.with_name(f".{path.name}.review.lock"), wait=False, in_use=in_use):
        for number, item in enumerate(items, start=1):
            # another page may have decided meanwhile
            if item.id in {other.id for other in pending(path)}:
                _show(console, item, f"{number} of {len(items)}")
                if not _ask(console, path, item):
                    break
    counts = count_decisions(path)
    console.print(", ".join(f"{count} {name}" for name, count in _name_counts(counts).items()))
    return 0


def _name_counts(counts: Mapping[str, int]) -> dict[str, int]:
    names = {"pending": "to review", "accept": "accepted", "edit": "edited", "reject": "rejected"}
    return {names[decision]: count for decision, count in counts.items()}


def _show(console: Console, item: ReviewItem, place: str) -> None:
    from rich.text import Text

    from lory.chat.terminal import visible

    console.rule(place)
    about = " · ".join(part for part in (item.reason, item.model, item.time) if part)
    scores = "  ".join(f"{name} {value:.3g}" for name, value in item.scores.items())
    for line in (about, scores):
        if line:
            console.print(Text(visible(line), style="dim"))
    for message in item.prompt:
        console.print(Text.assemble((f"{message['role']}: ", "bold"), visible(str(message["content"]))))
    answer = Text(visible(item.answer))
    for start, end in find_repeats(answer.plain):
        answer.stylize("black on yellow", start, end)
    console.print(Text.assemble(("answer: ", "bold green"), answer), end="\n\n")


def find_repeats(answer: str) -> list[tuple[int, int]]:
    """Where the words or sentences stand that the answer says again and again, as (start, end) of characters."""
    found = [run[0]] if (run := find_word_run(split_words(answer))) else []
    if sentence := find_repeated_sentence(answer):
        found.append(tuple(split_words(sentence[0])))
    spans = [match.span() for words in found for match in _pattern(words).finditer(answer)]
    return sorted(set(spans))


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds these words in a text, whatever signs are between them."""
    text = re.escape(words[0])
    for one, other in itertools.pairwise(words):
        # scripts without spaces have nothing between two words
        text += (r"[\W_]+" if one.isascii() and other.isascii() else r"[\W_]*") + re.escape(other)
    return re.compile(rf"(?<![A-Za-z0-9]){text}(?![A-Za-z0-9])", re.IGNORECASE)


KEYS = {"a": "accept", "e": "edit", "r": "reject", "s": "skip", "q": "quit"}


def _ask(console: Console, path: Path, item: ReviewItem) -> bool:
    """Let the person decide about an item; False to leave."""
    while True:
        choice = KEYS[_read_key()]
        if choice in ("skip", "quit"):
            return choice == "skip"
        if choice != "edit":
            decide(path, item.id, cast("Decision", choice))
            return True
        text = _edit(item.answer)
        if text is not None and text.strip() and text != item.answer:
            decide(path, item.id, "edit", text)
            return True
        console.print("The answer was not changed.")


def _read_key() -> str:
    """One of `KEYS`, without Enter; Ctrl-C and Ctrl-D quit."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("<any>")
    def _(event: KeyPressEvent) -> None:
        """Other keys do nothing."""

    for key in (*KEYS, "c-c", "c-d"):

        @bindings.add(key)
        def _(event: KeyPressEvent, key: str = key) -> None:
            event.app.exit(result=key if key in KEYS else "q")

    message = "  ".join(f"[{key}]{name[1:]}" for key, name in KEYS.items())
    session: PromptSession[str] = PromptSession(f"{message} ", key_bindings=bindings)
    return session.prompt()


def _edit(answer: str) -> str | None:
    """The answer as the person leaves it in $VISUAL, $EDITOR or, where neither is set, here; None: given up."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if editor:
        return _edit_in(shlex.split(editor), answer)
    from prompt_toolkit import prompt

    print("Esc and then Enter keeps the text, Ctrl-C gives up.")
    try:
        return prompt(default=answer, multiline=True).rstrip("\n")
    except (KeyboardInterrupt, EOFError):
        return None


def _edit_in(editor: Sequence[str], answer: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="lory-review-") as folder:
        file = Path(folder) / "answer.md"
        file.write_text(answer + "\n", encoding="utf-8")
        try:
            subprocess.run([*editor, str(file)], check=True)
            return file.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError, subprocess.CalledProcessError) as error:
            print(f"The editor {' '.join(editor)} failed: {error}")
            return None
