"""The repetition guard: planted loops that it finds, ordinary documents that it leaves alone, and what a token costs.

    python -m benchmarks.guard [--loops 1000] [--files 1000] [--data FILE ...] [--plant FILE ...] [--json]

Loops of 1 to 200 tokens are cut from prose, source code or the --plant files and repeated after an ordinary beginning,
to 8 copies or 480 tokens: exactly; with each copy changed anew (up to 5% of its tokens, a share drawn for each loop);
or drifting, each copy changed from the one before. Each length is as likely as another ("even"), or each doubling of it
("log": half of the loops have fewer than 15 tokens). They are told apart by what they were cut from: "words", where 85%
of the characters are letters, and "signs": code, tables, formulas, numbers.

The delay counts from the loop's first token: after 3 periods two copies of the first have been seen. A word said three
times is no loop, and a phrase said three times with one word changed is hardly one; so "within 3" is told four times:
with at least 32 tokens allowed, with 12, with none, and with none for periods of 2 tokens and more ("from 2").

Ordinary documents: Python's standard library, tests included, made-up lists, tables, JSON, numbers, verses and
sentences with words filled in, and the --data files: each line of a .txt or .jsonl file, each answer of a .json file of
Alpaca records, any other file as a whole. A document with any alarm is a false alarm; the interval is Wilson's at 95%.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from lory.decoding.guard import RepetitionGuard, find_loop
from lory.decoding.words import Words

LONGEST_FILE = 24_000  # characters, about 7,000 tokens
MODES = ("exact", "changed", "drifting")
RANGES = ((1, 9), (10, 39), (40, 200))
LETTERS = 0.85
Ids = list[int]


def read_library(count: int, seed: int) -> list[str]:
    """The beginnings of `count` source files of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(seed).shuffle(files)
    texts = (path.read_text(encoding="utf-8", errors="replace")[:LONGEST_FILE] for path in files)
    return [text for _, text in zip(range(count), (text for text in texts if len(text) > 500), strict=False)]


def read_prose() -> list[str]:
    """The answers of lory's own general records."""
    lines = resources.files("lory.data").joinpath("texts/general.jsonl").read_text(encoding="utf-8").splitlines()
    return [message["content"] for line in lines for message in json.loads(line)["messages"][1:]]


def read_data(path: Path) -> Iterator[str]:
    """A .txt or .jsonl file's lines, the answers of Alpaca records in a .json file, or another file's whole text."""
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = text.splitlines() if path.suffix in (".txt", ".jsonl") else [text]
    if path.suffix == ".json" and isinstance(records := json.loads(text), list):
        parts = [record["output"] for record in records if isinstance(record, dict) and record.get("output")] or parts
    for part in parts:
        yield part[:LONGEST_FILE]


def fill(said: list[str], filled: dict[int, str]) -> str:
    """The sentence with other words at some places."""
    return " ".join(filled.get(place, word) for place, word in enumerate(said))


def make_document(draw: random.Random, words: list[str]) -> str:
    """A list, a table, JSON, numbers, a sum in steps, verses with a refrain, or a sentence with words filled in."""
    rows = draw.randint(8, 60)

    def say(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    kind = draw.randrange(9)
    if kind == 0:
        return "".join(f"- item {row}: {say(1, 6)}\n" for row in range(1, rows))
    if kind == 1:
        head = "| name | count | price | open |\n| --- | --- | --- | --- |\n"
        cells = (
            f"| {say(1, 2)} | {draw.randint(0, 9)} | {draw.randint(0, 99)}.00 | {draw.choice(['yes', 'no'])} |\n"
            for _ in range(rows)
        )
        return head + "".join(cells)
    if kind == 2:
        records = [{"id": row, "name": say(1, 3), "ok": draw.random() < 0.8, "tags": []} for row in range(rows)]
        return json.dumps(records, indent=draw.choice([None, 2]))
    if kind == 3:
        return "1" + "0" * draw.randint(20, 300) + "\n" + " ".join(str(draw.randint(0, 9)) for _ in range(10 * rows))
    if kind == 4:
        return "".join(f"{row} x {rows} = {row * rows}\n" for row in range(rows))
    if kind == 5:
        refrain = "\n".join(say(4, 7) for _ in range(4))
        return "\n\n".join("\n".join(say(4, 7) for _ in range(4)) + "\n\n" + refrain for _ in range(6))
    if kind == 6:
        return "".join(
            f"{say(1, 3)}\n{draw.choice('-=~*') * draw.randint(10, 120)}\n{say(10, 40)}\n\n" for _ in range(8)
        )
    if kind == 7:
        said = say(8, 20).split()
        slots = draw.sample(range(len(said)), k=draw.randint(2, 3))
        filled = zip(*(draw.sample(sorted(set(words)), k=rows) for _ in slots), strict=True)
        return "".join(fill(said, dict(zip(slots, row, strict=True))) + "\n" for row in filled)
    return "".join(f"{draw.randint(0, 1)},{draw.randint(0, 1)},0,{draw.random():.3f}\n" for _ in range(rows))


def plant_loop(draw: random.Random, period: int, mode: str, start: Ids, source: Ids) -> Ids:
    """`start`, and then a loop whose first copy is cut from `source`."""
    place = draw.randrange(len(source) - period)
    copy = base = source[place : place + period]
    rate = draw.uniform(0, 0.05)
    ids = start + base
    for _ in range(max(8, math.ceil(480 / period)) - 1):
        if mode != "exact":
            before = copy if mode == "drifting" else base
            copy = [draw.choice(source) if draw.random() < rate else token for token in before]
        ids += copy
    return ids


def is_wordy(text: str) -> bool:
    """Whether a piece of text consists of words, more than of signs and numbers."""
    shown = [character for character in text if not character.isspace() and character != "\ufffd"]
    return sum(character.isalpha() for character in shown) >= LETTERS * len(shown) > 0


def draw_period(draw: random.Random, spread: str) -> int:
    return draw.randint(1, 200) if spread == "even" else int(math.exp(draw.uniform(0, math.log(201))))


def measure_loops(
    count: int, sources: dict[str, list[Ids]], words: Words, tokenizer: Any, seed: int
) -> dict[str, dict[str, float]]:
    """By source, mode, spread of periods, what the loop was cut from and range: the share found, and the delay."""
    draw = random.Random(seed)
    delays: dict[str, list[tuple[int, int | None]]] = defaultdict(list)
    for name, documents in sources.items():
        flat = [token for document in documents for token in document]
        for mode, spread in itertools.product(MODES, ("even", "log")):
            for _ in range(count):
                period = draw_period(draw, spread)
                start = draw.choice(documents)[: draw.randint(20, 300)]
                planted = plant_loop(draw, period, mode, start, flat)[len(start) :]
                guard = RepetitionGuard(words)
                # an ordinary beginning that raises an alarm is a matter of the other half of this benchmark
                if find_loop(start, guard):
                    guard.rewind(len(start))
                found = find_loop(planted, guard)
                delay = (period, len(guard) - len(start) if found else None)
                cut = "words" if is_wordy(tokenizer.decode(planted[:period])) else "signs"
                least, most = next((least, most) for least, most in RANGES if period <= most)
                kind = f"{name}, {mode}, {spread}"
                for key in (kind, f"{kind}, {cut}", f"{kind}, {cut}, {least}-{most}"):
                    delays[key].append(delay)
    return {key: summarize(delays[key]) for key in sorted(delays)}


def summarize(delays: list[tuple[int, int | None]]) -> dict[str, float]:
    found = [(period, delay) for period, delay in delays if delay is not None]

    def share(periods: int, least: int) -> float:
        return sum(delay <= max(periods * period, least) for period, delay in found) / len(delays)

    return {
        "loops": len(delays),
        "found": len(found) / len(delays),
        "within_3_or_32": share(3, 32),
        "within_3_or_12": share(3, 12),
        "within_3": share(3, 0),
        "within_3_from_2": sum(period > 1 and delay <= 3 * period for period, delay in found)
        / max(1, sum(period > 1 for period, _ in delays)),
        "within_4_or_32": share(4, 32),
    }


def interval(alarms: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a rate at 95%."""
    z, rate = 1.96, alarms / count
    middle = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, (middle - spread) / (1 + z * z / count)), (middle + spread) / (1 + z * z / count)


def measure_alarms(kinds: dict[str, list[Ids]], words: Words, tokenizer: Any) -> dict[str, Any]:
    """False alarms by kind of document, with what was taken for a loop, and microseconds a token."""
    report: dict[str, Any] = {}
    tokens = 0
    started = time.process_time()
    for kind, documents in kinds.items():
        examples = []
        for document in documents:
            tokens += len(document)
            if loop := find_loop(document, RepetitionGuard(words)):
                examples.append(tokenizer.decode(document[loop.start :][: 2 * loop.period])[:200])
        report[kind] = {"documents": len(documents), "alarms": len(examples), "examples": examples[:5]}
    seconds = time.process_time() - started
    count, alarms = (sum(entry[key] for entry in report.values()) for key in ("documents", "alarms"))
    report["all"] = {"documents": count, "alarms": alarms, "rate": alarms / count, "interval": interval(alarms, count)}
    report["microseconds_per_token"] = seconds / tokens * 1e6
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=1000, help="planted loops of each mode and source")
    parser.add_argument("--files", type=int, default=1000, help="source files, and as many made-up documents")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="more ordinary text")
    parser.add_argument("--plant", type=Path, nargs="*", default=[], help="more text to cut loops from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from lory.models.embedded import prepare_smollm2

    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    words = Words(tokenizer)
    draw = random.Random(options.seed)
    vocabulary = " ".join(read_prose()).split()
    texts = {"code": read_library(options.files, options.seed), "prose": read_prose()}
    texts["made up"] = [make_document(draw, vocabulary) for _ in range(options.files)]
    texts |= {path.name: [text for text in read_data(path) if text.strip()] for path in options.data}
    kinds = {kind: tokenizer(documents, add_special_tokens=False)["input_ids"] for kind, documents in texts.items()}
    sources = {kind: kinds[kind] for kind in ("prose", "code")}
    for path in options.plant:
        sources[path.name] = tokenizer([*read_data(path)], add_special_tokens=False)["input_ids"]
    report = {
        "loops": measure_loops(options.loops, sources, words, tokenizer, options.seed),
        "alarms": measure_alarms(kinds, words, tokenizer),
    }
    if options.json:
        print(json.dumps(report))
        return
    for name, figures in report["loops"].items():
        print(f"{name:40}", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    for name, figures in report["alarms"].items():
        print(f"{name:28}", figures)


if __name__ == "__main__":
    main()
