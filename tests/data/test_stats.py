"""Statistics are what one counts by hand, for sets, for mixtures and for streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lory.data.looking.histogram import Histogram, count_lengths, draw_blocks, draw_picture
from lory.data.looking.stats import SourceStats, add_up, describe_dataset
from lory.runtime import LoryError
from lory.training.config import Config
from lory.training.run import Prepared, prepare

PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris, and it is on the river Seine."),
    ("法国的首都是哪里？", "法国的首都是巴黎。"),
    ("Why?", "B"),
    ("What is it that you do in the morning?", "7"),
    ("What is the capital of France?", "The capital of France is Paris, and it is on the river Seine."),
]


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path) -> Callable[..., Prepared]:
    """The tiny model's view of some data."""

    def make(*sources: dict[str, Any], **data: Any) -> Prepared:
        values = {"train": list(sources), "max_tokens": 256, "cache": False, **data}
        return prepare(
            Config.model_validate({"model": {"path": str(tiny_model)}, "data": values, "train": {"max_steps": 3}})
        )

    return make


def write(path: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    records = [{"instruction": question, "output": answer} for question, answer in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"path": str(path)}


def describe(prepared: Prepared, most: int = 3) -> list[SourceStats]:
    return describe_dataset(prepared.dataset, prepared.tokenizer, prepared.config.data.max_tokens, most)


def test_a_source_is_counted_as_by_hand(made: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = made(write(tmp_path / "a.jsonl", [*PAIRS, ("Long?", "long " * 400), ("Empty?", " ")]))
    (found,) = describe(prepared)
    train = prepared.dataset.train
    assert (found.name, found.read) == ("a.jsonl", 7)
    assert found.conversations == found.samples == {"train": 5, "eval": 0}
    assert found.dropped == {"longer than 256 tokens": 1, "empty answer": 1}
    assert found.tokens == sum(len(sample) for sample in train)
    assert found.supervised_tokens == sum(sample.supervised for sample in train)
    assert found.supervised_share == pytest.approx(found.supervised_tokens / found.tokens, abs=1e-4)
    assert sum(found.histogram.counts) == 5
    assert found.exact_duplicates == 1


def test_odd_records_are_named_with_place_and_words(made: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = made(write(tmp_path / "a.jsonl", PAIRS))
    (found,) = describe(prepared, most=2)
    place = f"{tmp_path}/a.jsonl"
    lengths = [len(sample) for sample in prepared.dataset.train]
    learnt = [sample.supervised for sample in prepared.dataset.train]
    assert [record.tokens for record in found.longest] == sorted(lengths, reverse=True)[:2]
    assert [record.tokens for record in found.shortest] == sorted(lengths)[:2]
    # of equal ones the first
    assert [record.where for record in found.emptiest] == [f"{place} line 3", f"{place} line 4"]
    assert [record.learnt for record in found.emptiest] == sorted(learnt)[:2]
    assert found.emptiest[0].text.split() == ["Why?", "assistant", "B"]


def test_a_shared_system_prompt_is_not_shown(made: Callable[..., Prepared], tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", PAIRS) | {"system": "You are a very helpful parrot."}
    (found,) = describe(made(source))
    assert found.shortest[0].text.startswith("Why?")


def test_languages_are_told_by_the_answer_or_else_by_the_question(
    made: Callable[..., Prepared], tmp_path: Path
) -> None:
    (found,) = describe(made(write(tmp_path / "a.jsonl", PAIRS)))
    assert found.languages == {"en": 0.6, "zh": 0.2, "other": 0.2}


def test_duplicates_across_sources_count_where_they_come_second(made: Callable[..., Prepared], tmp_path: Path) -> None:
    sources = write(tmp_path / "a.jsonl", PAIRS[:3]), write(tmp_path / "b.jsonl", PAIRS[1:])
    for duplicates, kept in (("fold", 4), ("drop", 1)):
        first, second = describe(made(*sources, duplicates=duplicates))
        assert (first.exact_duplicates, second.exact_duplicates) == (0, 3)
        assert second.conversations["train"] == kept


def test_near_duplicates_are_noted(made: Callable[..., Prepared], tmp_path: Path) -> None:
    train, apart = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", [(f"{PAIRS[0][0]}?", PAIRS[0][1])])
    _, held_out = describe(made(train, eval=[apart]))
    assert held_out.conversations == {"train": 0, "eval": 1}
    assert ["nearly the same" in note for note in held_out.notes] == [True]


def test_records_that_are_mixed_in_twice_count_once(made: Callable[..., Prepared], tmp_path: Path) -> None:
    sources = (
        write(tmp_path / "a.jsonl", PAIRS[:3]),
        write(tmp_path / "b.jsonl", [(f"{n}?", "Yes.") for n in range(20)]),
    )
    first, _ = describe(made(*sources, mixing="all_exhausted"))
    assert first.conversations["train"] == 3


def test_everything_adds_up(made: Callable[..., Prepared], tmp_path: Path) -> None:
    sources = write(tmp_path / "a.jsonl", PAIRS[:3]), write(tmp_path / "b.jsonl", [("Why not?", "C"), ("?", " ")])
    both = describe(made(*sources))
    total = add_up(both)
    assert total["read"] == 5
    assert total["conversations"] == {"train": 4, "eval": 0}
    assert total["tokens"] == both[0].tokens + both[1].tokens
    assert total["dropped"] == {"empty answer": 1}
    assert sum(total["histogram"]["counts"]) == 4
    assert total["languages"] == {"en": 0.5, "zh": 0.25, "other": 0.25}
    assert [record["where"].rpartition("/")[2] for record in total["emptiest"]][:2] == [
        "a.jsonl line 3",
        "b.jsonl line 1",
    ]
    json.dumps([total, *(source.to_dict() for source in both)])


def test_a_source_of_which_nothing_is_left_is_all_zeros(made: Callable[..., Prepared], tmp_path: Path) -> None:
    long = write(tmp_path / "b.jsonl", [("Long?", "long " * 400)])
    _, found = describe(made(write(tmp_path / "a.jsonl", PAIRS), long))
    assert (found.read, found.conversations, found.tokens) == (1, {"train": 0, "eval": 0}, 0)
    assert (found.lengths, found.languages, found.longest, found.emptiest) == (None, {}, [], [])


def test_a_stream_is_described_by_its_first_window(made: Callable[..., Prepared], tmp_path: Path) -> None:
    sources = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", [("Long?", "long " * 400), *PAIRS])
    (window,) = describe(made(*sources, streaming=True, window_samples=8))
    assert window.read is None
    assert window.name == "the stream's first window"
    assert window.conversations == {"train": 7, "eval": 0}
    # line 5 repeats line 1, and so do b.jsonl's lines 2 and 3 what a.jsonl has
    assert window.exact_duplicates == 3
    assert sum(window.dropped.values()) == 1


# Histograms


def test_a_length_on_an_edge_begins_a_bin() -> None:
    histogram = count_lengths(np.array([0, 63, 64, 127, 128, 1024]), 1024)
    assert histogram.edges[:3] == (0, 80, 160)
    assert sum(histogram.counts) == 6
    assert count_lengths(np.array([9, 10, 10]), 150) == Histogram(tuple(range(0, 161, 10)), (1, 2, *([0] * 14)))


@pytest.mark.parametrize("longest", [8, 15, 16, 17, 512, 1000, 4096, 131072])
def test_bins_are_few_and_reach_the_longest(longest: int) -> None:
    histogram = count_lengths(np.array([1, longest]), longest)
    assert sum(histogram.counts) == 2
    assert 5 <= len(histogram.counts) <= 18


def test_blocks_are_as_long_as_the_counts() -> None:
    lines = draw_blocks(Histogram((0, 10, 20, 30, 40), (0, 8, 1, 0)), width=8)
    assert lines == ["10-19 ████████ 8", "20-29 █ 1"]
    assert draw_blocks(Histogram((0, 10), (0,))) == []
    # one among thousands is still to be seen
    assert draw_blocks(Histogram((0, 10, 20), (5000, 1)), width=8)[1] == "10-19 ▏ 1"


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    parts = {"a $1 file": Histogram((0, 10, 20), (1, 2)), "b": Histogram((0, 10, 20), (3, 0))}
    draw_picture(parts, 16, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LoryError, match=r"Could not write .*missing"):
        draw_picture(parts, 16, tmp_path / "missing" / "a.png")
