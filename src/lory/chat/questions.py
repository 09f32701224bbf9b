"""Many questions out of a file, answered into another: batch by batch, gone on with after an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.batch import Answer, answer_batch, gather, plan_batches, seeded
from lory.chat.conversations import Talk, read_talks
from lory.generate import Ending, GenerationOptions, Ids, decode_text
from lory.runtime import UsageError, explain_os_error, hash_file, lock_file, log, read_json, write_json, write_text
from lory.types import Message

if TYPE_CHECKING:
    from lory.assistant import Assistant


@dataclass(frozen=True)
class Report:
    """What became of the questions."""

    output: str
    questions: int
    """In the file."""
    there: int
    """Answered before, and not asked again."""
    answered: int
    failed: int
    """They could not be asked, as the output says of each, those of before included."""
    tokens: int
    """Of the new answers."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return {**asdict(self), "tokens_per_second": round(rate, 2)}


def answer_file(
    assistant: Assistant,
    questions: Path,
    output: Path,
    about: Mapping[str, Any],
    system: str | None = None,
    options: GenerationOptions | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Answer the questions of a file (see `conversations.read_talks`) into a file of one JSON object a line.

    A line has the `messages` with the answer, so it can be trained on, and the `number` of the question. Lines are
    written batch by batch, and put in order at the end. What the output has already is not asked again.

    Args:
        about: what else the answers depend on, such as the model's name; kept beside the output with the options.
        system: the system prompt of conversations that have none.
        progress: called with (done, total) questions.

    Raises:
        UsageError: bad files, or the output was begun with other questions or options.
        LoryError: the generation failed, or the disk is full.
    """
    options = options or assistant.options
    talks = [_add_system(talk, system) for talk in read_talks(questions)]
    settings = {**about, "questions": hash_file(questions), "system": system, "options": options.model_dump()}
    if output.absolute() == questions.absolute():
        raise UsageError(f"{output} was given for the questions and for the answers; name another file for these.")
    lock = _aside(output, "lock")
    with lock_file(lock, wait=False, in_use=f"{output} is being written by another command."):
        try:
            there = _go_on(output, settings)
            work = _Work(assistant, talks, options, batch_size, output, there, progress)
            began = time.monotonic()
            work.run()
            seconds = time.monotonic() - began
            write_text(output, "".join(work.lines[number] for number in sorted(work.lines)))
        finally:
            lock.unlink(missing_ok=True)
    failed = sum("error" in json.loads(line) for line in work.lines.values())
    return Report(str(output), len(talks), len(there), len(talks) - len(there), failed, work.tokens, round(seconds, 3))


def _aside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}.{what}")


def _add_system(talk: Talk, system: str | None) -> Talk:
    if system is None or talk.messages[0].role == "system":
        return talk
    return Talk(talk.where, (Message("system", system), *talk.messages), talk.answer)


def _go_on(output: Path, settings: dict[str, Any]) -> dict[int, str]:
    """The lines that are there, by the number of their question; a last one that was cut off is taken away."""
    beside = _aside(output, "settings.json")
    if not output.exists():
        write_json(beside, settings)
        return {}
    if not beside.exists():
        raise UsageError(f"{output} exists, and not from this command ({beside.name} is missing); name another file.")
    before = read_json(beside)
    changed = _list_changes(before if isinstance(before, dict) else {}, json.loads(json.dumps(settings)))
    if changed:
        raise UsageError(
            f"{output} was begun with other settings: {'; '.join(changed)}. Go on with the old ones, or name another "
            "output file."
        )
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        log.info("%s: its last line was cut off, and is answered again.", output)
        with output.open("r+b") as file:
            file.truncate(len(whole))
    lines: dict[int, str] = {}
    for at, line in enumerate(whole.decode().split("\n")[:-1], 1):
        try:
            lines[int(json.loads(line)["number"])] = line + "\n"
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{output}, line {at} is not what this command writes; name another file.") from error
    return lines


def _list_changes(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    changes = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _list_changes(old, new)
        elif old != new and key in ("questions", "weights"):
            changes.append(f"the {key} are not the same")
        elif old != new:
            changes.append(f"{key} (was {_show(old)}, is {_show(new)})")
    return changes


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


class _Work:
    """The questions under way."""

    def __init__(
        self,
        assistant: Assistant,
        talks: Sequence[Talk],
        options: GenerationOptions,
        batch_size: int,
        output: Path,
        there: Mapping[int, str],
        progress: Callable[[int, int], None],
    ) -> None:
        self.assistant, self.talks, self.options, self.batch_size = assistant, talks, options, batch_size
        self.output, self.progress = output, progress
        self.lines = dict(there)
        self.tokens = 0

    def run(self) -> None:
        """Ask whatever has no line yet."""
        self.progress(len(self.lines), len(self.talks))
        failed = {number for number, line in self.lines.items() if "error" in json.loads(line)}
        # what is drawn depends on the batch, so the batches have to be what they would have been
        drawn = self.options.do_sample and self.options.seed is not None
        numbers = [n for n in range(1, len(self.talks) + 1) if n not in (failed if drawn else self.lines)]
        for window in gather(numbers, self._prompt, self.batch_size):
            prompts = [prompt for _, prompt in window]
            for places in plan_batches(self.assistant.model, prompts, self.options, self.batch_size):
                missing = [place for place in places if window[place][0] not in self.lines]
                if missing:
                    self._ask([window[place] for place in missing], seed=window[places[0]][0])

    def _prompt(self, number: int) -> Ids | None:
        try:
            return self.assistant.prompt(self.talks[number - 1].messages)
        except UsageError as error:
            self._write({number: _fail(error)})
            return None

    def _ask(self, batch: Sequence[tuple[int, Ids]], seed: int) -> None:
        assistant, options = self.assistant, seeded(self.options, seed)
        numbers, prompts = [number for number, _ in batch], [prompt for _, prompt in batch]
        if options.on_loop == "retry":
            self._write({number: self._ask_again(number, options) for number in numbers})
            return
        try:
            answers = answer_batch(assistant.model, assistant.tokenizer, prompts, options, assistant.terminators)
        except UsageError as error:
            # all of a batch have the same room for an answer, and these have none
            self._write(dict.fromkeys(numbers, _fail(error)))
            return
        self._write({number: self._describe(answer) for number, answer in zip(numbers, answers or (), strict=True)})

    def _ask_again(self, number: int, options: GenerationOptions) -> dict[str, Any]:
        ending = Ending()
        try:
            text = "".join(self.assistant.stream(self.talks[number - 1].messages, options, ending))
        except UsageError as error:
            return _fail(error)
        tokens = len(self.assistant.tokenizer(text, add_special_tokens=False)["input_ids"])
        return {"answer": text, "finish_reason": ending.reason, "tokens": tokens}

    def _describe(self, answer: Answer) -> dict[str, Any]:
        text = decode_text(self.assistant.tokenizer, answer.ids)
        return {"answer": text, "finish_reason": answer.reason, "tokens": len(answer.ids)}

    def _write(self, found: Mapping[int, Mapping[str, Any]]) -> None:
        """Add lines to the output, all at once."""
        new = {number: self._line(number, values) for number, values in found.items() if number not in self.lines}
        try:
            with self.output.open("ab") as file:
                file.write("".join(new.values()).encode())
        except OSError as error:
            raise explain_os_error(error, f"write {self.output}") from error
        self.lines |= new
        self.tokens += sum(values.get("tokens", 0) for values in found.values())
        self.progress(len(self.lines), len(self.talks))

    def _line(self, number: int, values: Mapping[str, Any]) -> str:
        talk = self.talks[number - 1]
        rest = {key: value for key, value in values.items() if key != "answer"}
        messages = [message.to_dict() for message in talk.messages]
        if "answer" in values:
            messages.append({"role": "assistant", "content": values["answer"]})
        if talk.answer is not None:
            rest["target"] = talk.answer.content
        return json.dumps({"number": number, "messages": messages, **rest}, ensure_ascii=False) + "\n"


def _fail(error: UsageError) -> dict[str, Any]:
    return {"error": " ".join(str(error).split())}
