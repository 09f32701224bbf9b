"""New data out of a few examples: self-instruct (Wang et al. 2022, arXiv 2212.10560) through a chat API.

A first kind of call shows the model eight known instructions and asks for new ones; a second kind answers each of these
by itself, so that an answer is as long as it needs to be and written under the system prompt that will be learnt. The
paper's step between, which tells classification from other tasks, is left out, as Alpaca did: chat models need no
other prompt for it.

What is asked depends on the settings and on earlier replies in the order of the calls, never on which came first. So a
run that stopped goes through its journal and comes to where it was, and a larger count goes on from a smaller one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lory.data.making.completions import REFUSED, Api, Client
from lory.data.making.journal import Journal, Reply
from lory.data.making.novelty import NoveltyIndex
from lory.data.making.quality import judge_answer, judge_instruction
from lory.data.sources.read import SourceConfig, open_source
from lory.runtime import LoryError, UsageError, lock_file, write_text

_VERSION = 1
"""Raise it when prompts or their order change: a journal of another version cannot be gone on with."""
SHOWN_SEEDS, SHOWN_NEW = 6, 2
"""How many instructions a prompt shows, as in the paper."""
ASKED = 8
"""How many new ones it asks for."""
_MOST_PROMPTS = 16
"""Prompts of a round; all of its new instructions are known before the next one is composed."""
_BARREN_ROUNDS = 5
"""After so many rounds without a new record the API is not asked further."""
_LONGEST_SEED = 1000

_PROMPT = """\
You write instructions with which an assistant will be trained. Here are {shown} examples:

{examples}

Write {asked} new instructions.
- Each one differs from the examples and from the others in its topic, its verb and its form: questions, requests, \
explaining, writing, rewriting, sorting, planning, calculating, code.
- Each one can be answered in text, without tools, files or images, and holds everything that is needed to answer it.
- Each one has one to three sentences{language}.

Reply with a JSON list of {asked} strings and nothing else."""

_NUMBERED = re.compile(r"^[ \t]*(?:\d+[.):]|[-*•])[ \t]+", re.MULTILINE)
_KEYS = ("instruction", "task", "question", "prompt", "text")

Record = dict[str, list[dict[str, str]]]
Call = tuple[str, list[dict[str, str]]]
"""A call's name, under which its reply stands in the journal, and its messages."""


@dataclass(frozen=True)
class Recipe:
    """What is to be generated."""

    seeds: tuple[str, ...]
    """Instructions to start from."""
    count: int
    """How many records."""
    system: str = ""
    """The system prompt of each record; empty: none."""
    language: str = ""
    """The instructions' language; empty: that of the seeds."""
    likeness: float = 0.4
    """From which on an instruction counts as a near duplicate (see `NoveltyIndex`)."""
    answer_words: tuple[int, int] = (1, 2000)
    """The fewest and the most words of an answer; in scripts without spaces, characters."""
    seed: int = 0
    """Picks the instructions that a prompt shows."""

    def settings(self, api: Api) -> dict[str, Any]:
        """All that the calls depend on; the count and the API's address may change from run to run."""
        return {
            "version": _VERSION,
            "model": api.model,
            "temperature": api.temperature,
            "max_tokens": api.max_tokens,
            "seeds": hashlib.sha256(json.dumps(self.seeds).encode()).hexdigest()[:16],
            "system": self.system,
            "language": self.language,
            "likeness": self.likeness,
            "answer_words": self.answer_words,
            "seed": self.seed,
        }


@dataclass
class Tally:
    """What happened so far."""

    accepted: int = 0
    asked: int = 0
    """Calls that the API answered in this run."""
    replayed: int = 0
    """Calls whose replies were taken from the journal."""
    prompt_tokens: int = 0
    """Of all calls, those in the journal included, as the API counts them."""
    completion_tokens: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """What was not taken, by reason."""

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return {**vars(self), "rejected": dict(self.rejected)}


def read_seeds(path: str) -> tuple[str, ...]:
    """The first user messages of any data that lory reads; overlong ones are left out, since they fill the prompts.

    Raises:
        UsageError: no such data, or no instruction in them.
    """
    firsts = (
        next((message.content.strip() for message in conversation.messages if message.role == "user"), "")
        for conversation in open_source(SourceConfig.model_validate(path))
    )
    seeds = tuple(dict.fromkeys(text for text in firsts if 0 < len(text) <= _LONGEST_SEED))
    if not seeds:
        raise UsageError(
            f"{path} has no instruction to start from: a user's message of up to {_LONGEST_SEED} characters."
        )
    return seeds


def generate(
    api: Api,
    recipe: Recipe,
    out: Path,
    concurrency: int = 8,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Write `recipe.count` new records to `out`, one JSON object a line in the format `messages`.

    Every reply of the API is kept in ``OUT.journal`` beside it; where that is there, the run goes on from it.

    Raises:
        UsageError: `out` exists without a journal, the journal is of other settings, or the API refuses the key, the
            model or the request.
        LoryError: the API does not answer, nothing new comes any more, or Ctrl-C; what is accepted has been written.
    """
    journal_path = out.with_name(f"{out.name}.journal")
    if out.exists() and not journal_path.exists():
        raise UsageError(f"{out} exists already, without a journal to go on from; choose another file.")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no folder; make it first.")
    in_use = f"{out} is being written by another run; wait until it has ended."
    with (
        lock_file(out.with_name(f".{out.name}.lock"), wait=False, in_use=in_use),
        Journal(journal_path, recipe.settings(api)) as journal,
    ):
        work = _Work(api, recipe, journal, concurrency, progress)
        try:
            asyncio.run(work.run())
        except KeyboardInterrupt:
            raise LoryError(f"Stopped. {work.describe(out)}") from None
        except LoryError as error:
            if not journal.replies:
                raise
            raise type(error)(f"{error} {work.describe(out)}") from error
        finally:
            work.write(out)
    return work.tally


class _Work:
    """One run: what is known, what was accepted, and the calls that are under way."""

    def __init__(
        self, api: Api, recipe: Recipe, journal: Journal, concurrency: int, progress: Callable[[Tally], None]
    ) -> None:
        self.recipe, self.journal, self.progress = recipe, journal, progress
        self.client, self.free = Client(api), asyncio.Semaphore(concurrency)
        self.known = NoveltyIndex(recipe.likeness)
        for seed in recipe.seeds:
            self.known.add(seed)
        self.new: list[str] = []
        """Generated instructions, whether or not their answers were fit."""
        self.records: list[Record] = []
        self.tally = Tally()

    async def run(self) -> None:
        """Go round after round until there are enough records."""
        barren = 0
        async with self.client:
            for number in itertools.count():
                before = len(self.records)
                await self._go_round(number)
                if len(self.records) >= self.recipe.count:
                    return
                barren = 0 if len(self.records) > before else barren + 1
                if barren == _BARREN_ROUNDS:
                    raise LoryError(
                        f"The last {barren} rounds of calls gave nothing that is new and fit ({self._top_reasons()}); "
                        "give more seeds, another model or a higher --temperature, and another output file."
                    )

    async def _go_round(self, number: int) -> None:
        """Ask for instructions, then for the answers of those that are new, as many as are still wanted."""
        # the first rounds are small, for counts that are; never by the count itself, which may grow at a resumption
        prompts = [self._compose(number, slot) for slot in range(min(_MOST_PROMPTS, 2**number))]
        fresh = [at async for reply in self._ask_all(prompts) for at in self._take_instructions(reply)]
        while fresh and (wanted := self.recipe.count - len(self.records)) > 0:
            chosen, fresh = fresh[:wanted], fresh[wanted:]
            questions = iter(chosen)
            async for reply in self._ask_all([self._question(at) for at in chosen]):
                self._take_answer(self.new[next(questions)], reply)

    def _compose(self, number: int, slot: int) -> Call:
        """A prompt that shows some seeds and some new instructions and asks for more."""
        rng = random.Random(f"{self.recipe.seed} {number} {slot}")
        new = rng.sample(self.new, min(SHOWN_NEW, len(self.new)))
        seeds = rng.sample(self.recipe.seeds, min(SHOWN_SEEDS + SHOWN_NEW - len(new), len(self.recipe.seeds)))
        shown = [*seeds, *new]
        rng.shuffle(shown)
        language = f", in this language: {self.recipe.language}" if self.recipe.language else ""
        prompt = _PROMPT.format(
            shown=len(shown), examples=json.dumps(shown, ensure_ascii=False, indent=1), asked=ASKED, language=language
        )
        return f"instructions {number}.{slot}", [{"role": "user", "content": prompt}]

    def _question(self, at: int) -> Call:
        return f"answer {at}", self._begin(self.new[at])

    def _begin(self, instruction: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.recipe.system}] if self.recipe.system else []
        return [*system, {"role": "user", "content": instruction}]

    async def _ask_all(self, calls: Sequence[Call]) -> AsyncIterator[Reply]:
        """The replies in the order of the calls, each as soon as it can be; the first failure ends them all."""
        tasks = [asyncio.create_task(self._ask(name, messages)) for name, messages in calls]
        waiting, given = set(tasks), 0
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises what it failed of
                while given < len(tasks) and tasks[given].done():
                    yield tasks[given].result()
                    given += 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, name: str, messages: list[dict[str, str]]) -> Reply:
        reply = self.journal.replies.get(name)
        if reply is not None:
            self.tally.replayed += 1
        else:
            async with self.free:
                reply = await self.client.ask(messages)
                self.journal.add(name, reply)
            self.tally.asked += 1
        self.tally.prompt_tokens += reply.prompt_tokens
        self.tally.completion_tokens += reply.completion_tokens
        self.progress(self.tally)
        return reply

    def _take_instructions(self, reply: Reply) -> list[int]:
        """Take in the new and fit instructions of a reply; returns their numbers."""
        taken = []
        found = list(parse_instructions(reply.text))
        if not found:
            refused = reply.finish_reason == REFUSED
            self._reject("prompt refused by the API" if refused else "no list of instructions in the reply")
        for text in found:
            if why := judge_instruction(text):
                self._reject(why)
            elif not self.known.add(text):
                self._reject("near duplicate")
            else:
                taken.append(len(self.new))
                self.new.append(text)
        return taken

    def _take_answer(self, question: str, reply: Reply) -> None:
        answer = reply.text.strip()
        refused = "question refused by the API" if reply.finish_reason == REFUSED else ""
        if why := refused or judge_answer(question, answer, reply.finish_reason, *self.recipe.answer_words):
            self._reject(why)
            return
        self.records.append({"messages": [*self._begin(question), {"role": "assistant", "content": answer}]})
        self.tally.accepted = len(self.records)
        self.progress(self.tally)

    def _reject(self, reason: str) -> None:
        self.tally.rejected[reason] += 1

    def _top_reasons(self) -> str:
        return (
            ", ".join(f"{reason}: {count}" for reason, count in self.tally.rejected.most_common(3)) or "no reply at all"
        )

    def write(self, out: Path) -> None:
        """Write the records, if there are any."""
        if self.records:
            write_text(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records))

    def describe(self, out: Path) -> str:
        """What there is, and how to go on, for the end of an error."""
        there = f"{len(self.records)} of {self.recipe.count} records are in {out}" if self.records else "No record yet"
        return f"{there}; run the same command to go on, and what {self.journal.path} holds is not asked again."


def parse_instructions(text: str) -> Iterator[str]:
    """The instructions in a reply: a JSON list of texts or objects, or a numbered list; also of a broken-off one."""
    start = text.find("[")
    found = list(_parse_json(text, start)) if start >= 0 else []
    if not found:
        parts = _NUMBERED.split(text)[1:]
        found = [" ".join(part.split()) for part in parts]
    yield from (item.strip() for item in found)


def _parse_json(text: str, start: int) -> Iterator[str]:
    """The items one by one, so that those before a broken one are not lost."""
    decoder, at = json.JSONDecoder(strict=False), start + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        if isinstance(value, dict):
            value = next((value[key] for key in _KEYS if key in value), None)
        if isinstance(value, str):
            yield value
