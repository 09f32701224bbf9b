"""The guard finds loops of any period soon, and takes lists, tables and code for what they are."""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import AutoTokenizer

from lory.decoding.guard import RepetitionGuard, find_loop
from lory.decoding.words import Words
from lory.runtime import UsageError

Encode = Callable[[str], list[int]]

COLOURS = ["red", "green", "blue", "orange", "yellow", "black", "white", "grey"]
PROSE = (
    "The harbour lay quiet in the early light, and the first boats were already out on the water. Anna had walked "
    "down from the station with her bag over one shoulder; she stopped at the wall and counted the masts. Somebody "
    "was frying fish. A dog slept beside the nets, and two children threw stones at a bottle that would not sink. "
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def words(tokenizer: Any) -> Words:
    return Words(tokenizer)


@pytest.fixture(scope="module")
def encode(tokenizer: Any) -> Encode:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200])
def test_a_loop_is_found_with_its_place_and_period(period: int) -> None:
    start, loop = list(range(1000, 1050)), list(range(period))
    guard = RepetitionGuard()
    found = find_loop(start + loop * 40, guard)
    assert found
    assert (found.start, found.period) == (50, period)
    assert len(guard) - 50 <= max(3 * period, 32)
    assert found.kind == ("token" if period == 1 else "phrase" if period <= 8 else "passage")
    assert found.repeats == pytest.approx((len(guard) - 50) / period)


@pytest.mark.parametrize("mode", ["changed", "drifting"])
def test_loops_with_changed_tokens_are_found(mode: Literal["changed", "drifting"]) -> None:
    draw = random.Random(0)
    delays = []
    for _ in range(200):
        period = draw.randint(16, 200)
        base = copy = [draw.randrange(5000) for _ in range(period)]
        ids = list(base)
        for _ in range(9):
            copy = [
                draw.randrange(5000) if draw.random() < 0.03 else token
                for token in (base if mode == "changed" else copy)
            ]
            ids += copy
        guard = RepetitionGuard()
        loop = find_loop(ids, guard)
        assert loop
        assert loop.kind == "drift" or loop.changed == 0
        delays.append(len(guard) / period)
    assert sum(delay <= 3 for delay in delays) >= 0.97 * len(delays)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_change_among_the_first_tokens_does_not_move_the_beginning(changed: int) -> None:
    copies = [list(range(30)) for _ in range(4)]
    copies[1][changed] = 999
    guard = RepetitionGuard()
    loop = find_loop([500, 501, 502] + [token for copy in copies for token in copy], guard)
    assert loop
    assert (loop.start, loop.period, loop.kind) == (3, 30, "drift")
    assert len(guard) <= 3 + 3 * 30


def test_an_exact_loop_is_not_held_up_by_what_stands_before_it(encode: Encode, words: Words) -> None:
    start = encode(PROSE + "They sailed over")
    guard = RepetitionGuard(words)
    loop = find_loop(start + encode(" over and" * 40), guard)
    assert loop
    assert loop.changed == 0
    assert len(guard) - len(start) <= 12


def test_loops_in_text_are_found_within_three_periods(encode: Encode, words: Words) -> None:
    draw, ids = random.Random(1), encode(PROSE)
    late = 0
    for _ in range(300):
        period, rate = draw.randint(4, 60), draw.uniform(0, 0.05)
        base = ids[(place := draw.randrange(len(ids) - period)) : place + period]
        copies = [[draw.choice(ids) if draw.random() < rate else token for token in base] for _ in range(4)]
        guard = RepetitionGuard(words)
        loop = find_loop([token for copy in copies for token in copy], guard)
        late += loop is None or len(guard) > 3 * period
    # two tokens changed at one and the same place look like a row of a table, until there is a fourth copy
    assert late <= 10


def test_words_that_repeat_are_found_in_text_at_the_third_time(encode: Encode, words: Words) -> None:
    for repeated in (
        "I am sorry, but I cannot say. ",
        " very",
        " over and",
        "The cat sat on the mat and looked at me. ",
        PROSE,
    ):
        start, copies = encode(PROSE[:150]), encode(repeated * 40)
        guard = RepetitionGuard(words)
        loop = find_loop(start + copies, guard)
        assert loop, repeated
        # one word said three times may be meant
        assert len(guard) - len(start) <= (12 if loop.period == 1 else 3 * loop.period), repeated


def test_a_new_long_word_is_found_at_its_third_time_and_others_are_waited_for(encode: Encode, words: Words) -> None:
    start = encode(PROSE[:250] + " because it went on")
    assert len(start) > 40
    for said, word, least, most in (
        (start, " mountain", 3, 3),
        (start, " very", 6, 12),
        (start, " because", 6, 12),  # it was there before
        (encode(" ".join(random.Random(0).choices(COLOURS, k=40))), " mountain", 6, 12),  # a list of few values
    ):
        guard = RepetitionGuard(words)
        assert find_loop(said + encode(word * 40), guard)
        assert least <= len(guard) - len(said) <= most, word


def test_a_phrase_of_characters_of_several_tokens_is_one_and_a_single_character_is_waited_for(
    encode: Encode, words: Words
) -> None:
    for said in ("虽然", "我很高兴，"):
        guard = RepetitionGuard(words)
        loop = find_loop(encode(PROSE[:150]) + encode(said * 40), guard)
        assert loop, said
        assert len(guard) - len(encode(PROSE[:150])) <= 3 * len(encode(said)), said
    # neither laughter, nor a row of pictures or of blocks
    for drawn in ("力" * 4, "🚀" * 12, "━" * 30, "★★★★☆"):
        assert find_loop(encode("So glad! " + drawn + " " + PROSE), RepetitionGuard(words)) is None, drawn


@pytest.mark.parametrize("copy", [1, 2])
@pytest.mark.parametrize("changed", range(5))
def test_a_phrase_with_a_changed_token_is_found_at_its_third_copy(
    copy: int, changed: int, encode: Encode, words: Words
) -> None:
    copies = [encode(" stopped at the old harbour") for _ in range(6)]
    period = len(copies[0])
    copies[copy][changed] = encode(" under")[0]
    guard = RepetitionGuard(words)
    start = encode(PROSE[:150])
    assert find_loop(start + [token for copy in copies for token in copy], guard)
    assert len(guard) - len(start) <= 3 * period + 1


def test_sentences_filled_in_with_words_of_several_tokens_are_no_loop(encode: Encode, words: Words) -> None:
    said = PROSE.split()
    long = ["Kyrgyzstan", "Llanfairpwllgwyn", "Massachusetts", "Oberammergau", "Xochimilco", "Yoknapatawpha"]
    names = sorted({*said, *long})
    draw = random.Random(0)
    for _ in range(200):
        sentence = draw.choices(said, k=draw.randint(10, 24))
        slots = draw.sample(range(len(sentence)), k=2)
        rows = [list(sentence) for _ in range(8)]
        for slot in slots:
            for row, name in zip(rows, draw.sample(names, k=8), strict=True):
                row[slot] = name
        text = "\n".join(" ".join(row) for row in rows)
        assert find_loop(encode(text), RepetitionGuard(words)) is None, text


def test_a_changed_copy_of_prose_is_still_a_loop_and_changed_rows_are_none(encode: Encode, words: Words) -> None:
    sentence = "The harbour lay quiet in the early light, and the first boats were already out on the water. "
    changes = [("", ""), ("quiet", "still"), ("first", "last"), ("boats", "ships"), ("early", "late")]
    text = "".join(sentence.replace(*change) for change in changes)
    loop = find_loop(encode(text), RepetitionGuard(words))
    assert loop
    assert loop.kind == "drift"
    assert loop.repeats <= 3
    rows = "".join(
        f"The harbour of {name} lay quiet in the early light.\n" for name in ("Rome", "Nice", "Bari", "Kiel")
    )
    assert find_loop(encode(rows), RepetitionGuard(words)) is None


def pairs() -> list[tuple[str, str]]:
    said = list(dict.fromkeys(word.strip(".,;") for word in PROSE.split()))
    return list(zip(said, reversed(said), strict=True))


ORDINARY = {
    "list": "".join(f"- item {number}: {word}\n" for number, word in enumerate(PROSE.split())),
    "numbered steps": "".join(f"{n}. Press the key {n} and wait for the lamp {n + 1} to go on.\n" for n in range(40)),
    "table": "| a | b | c |\n| --- | --- | --- |\n" + "".join(f"| {n} | 0 | {n % 2} |\n" for n in range(40)),
    "zeros": "1" + "0" * 200,
    "matrix": "[" + "0, " * 90 + "0]",
    "rules": "Title\n" + "-" * 120 + "\n" + PROSE + "\n" + "=" * 120 + "\n",
    "json": "[" + ",\n".join(f'{{"id": {n}, "name": "{w}", "ok": true}}' for n, w in enumerate(PROSE.split())) + "]",
    "filled in": "".join(
        f"The train to {a} leaves from platform {b} at the same time every day.\n" for a, b in pairs()
    ),
    "copyrights": "".join(f"Copyright (C) {year} by {w} and others.\n" for year, w in enumerate(PROSE.split(), 1990)),
    "imports": "".join(f"from tools.words.{word.strip('.,;')} import {word.strip('.,;')}\n" for word in PROSE.split()),
    "refrain": "\n\n".join(
        f"{PROSE[70 * n : 70 * n + 70]}\n\nRow, row, row your boat\nGently down the stream" for n in range(4)
    ),
    "sums": "".join(f"{n} x 7 = {7 * n}\n" for n in range(40)),
    "code": "".join(
        f"def get_{word.strip('.,;')}(self):\n    return self._{word.strip('.,;')}\n\n" for word in PROSE.split()
    ),
    "emphasis": "No, no, no, no! " + PROSE + " Ha ha ha ha ha. " + "哈哈哈哈哈",
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_what_is_regular_is_no_loop(kind: str, encode: Encode, words: Words) -> None:
    assert find_loop(encode(ORDINARY[kind]), RepetitionGuard(words)) is None


def test_few_words_in_any_order_are_no_loop(encode: Encode, words: Words) -> None:
    draw = random.Random(0)
    values = ["red", "green", "blue", "orange", "yellow", "apple", "banana", "cherry", "north", "south"]
    alarms = 0
    for _ in range(100):
        said = draw.choices(values, k=60)
        # three times the same pair in a row is one by chance now and then
        alarms += find_loop(encode(", ".join(said)), RepetitionGuard(words)) is not None
        alarms += find_loop(encode(" ".join(said)), RepetitionGuard(words)) is not None
    assert alarms <= 12


def test_source_code_raises_no_alarm(encode: Encode, words: Words) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse", "json/decoder", "heapq", "textwrap", "calendar", "statistics", "token", "stat", "errno"):
        path = folder / f"{name}.py"
        if path.exists():
            assert find_loop(encode(path.read_text(encoding="utf-8")[:20_000]), RepetitionGuard(words)) is None, name


def test_a_loop_that_goes_on_is_reported_again() -> None:
    guard = RepetitionGuard()
    loops = [loop for token in list(range(20)) * 12 if (loop := guard.feed(token))]
    assert len(loops) >= 2
    assert {loop.period for loop in loops} == {20}
    assert loops[1].start >= loops[0].start + 2 * 20


def test_after_a_way_back_the_kept_copy_is_no_loop() -> None:
    guard = RepetitionGuard()
    loop = find_loop(list(range(20)) * 3, guard)
    assert loop
    guard.rewind(20)
    assert len(guard) == 20
    assert find_loop(range(100, 200), guard) is None
    assert find_loop(list(range(300, 320)) * 3, guard)


def test_a_token_costs_next_to_nothing(encode: Encode, words: Words) -> None:
    ids = encode(PROSE * 2 + ORDINARY["table"] + ORDINARY["json"]) * 4
    guard = RepetitionGuard(words)
    started = time.process_time()
    for token in ids:
        guard.feed(token)
    # about 1 microsecond
    assert (time.process_time() - started) / len(ids) < 30e-6


def test_a_period_of_none_is_refused() -> None:
    with pytest.raises(UsageError, match="max_period = 0"):
        RepetitionGuard(max_period=0)
