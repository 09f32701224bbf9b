"""Slices, conditions and draws take the rows that they say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lory.config import Section, build
from lory.data.sources.rows import MadeRows, Rows
from lory.data.sources.sampling import Condition, draw, parse_split, passes
from lory.runtime import UsageError


def rows(count: int) -> Rows:
    return MadeRows("made", lambda: [(f"row {n}", n) for n in range(count)], lambda: "")


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(10)),
        ("[:3]", range(3)),
        ("train[3:]", range(3, 10)),
        ("train[:]", range(10)),
        ("train[2:5]", range(2, 5)),
        ("train[:25%]", range(2)),
        ("train[25%:75%]", range(2, 8)),
        ("[-3:]", range(7, 10)),
        ("[:-3]", range(7)),
        ("[-20%:]", range(8, 10)),
        ("[:-20%]", range(8)),
        ("[8:100]", range(8, 10)),
        ("[5:5]", ()),
        ("[-100:2]", range(2)),
    ],
)
def test_a_slice_takes_its_rows(split: str, numbers: Any) -> None:
    (part,) = parse_split(split)
    cut = part.apply(rows(10))
    assert [value for _, value in cut.read()] == list(numbers)
    assert cut.count() == len(numbers)
    assert [value for _, value in cut.read(1)] == list(numbers)[1:]


def test_shares_part_a_source_without_rest_or_overlap() -> None:
    parts = [parse_split(f"[{share}%:{share + 10}%]")[0].apply(rows(37)) for share in range(0, 100, 10)]
    assert [value for part in parts for _, value in part.read()] == list(range(37))


def test_a_sum_of_splits_has_parts() -> None:
    assert [(part.name, part.first, part.last) for part in parse_split("train[:10%] + test[5:]+dev")] == [
        ("train", None, "10%"),
        ("test", "5", None),
        ("dev", None, None),
    ]


@pytest.mark.parametrize("split", ["", "train[", "train[1]", "train[a:b]", "train[:101%]", "a b", "train+", "[1.5:]"])
def test_a_wrong_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"a split is|more than 100%"):
        parse_split(split)


def test_rows_are_not_counted_without_need() -> None:
    class Uncountable(MadeRows):
        def count(self) -> int:
            raise AssertionError

    source = Uncountable("made", lambda: [("", n) for n in range(5)], lambda: "")
    assert [value for _, value in parse_split("[1:3]")[0].apply(source).read()] == [1, 2]


class _Filter(Section):
    filter: dict[str, Condition]


def keep(conditions: dict[str, Any], record: dict[str, Any]) -> bool:
    return passes(record, build(_Filter, {"filter": conditions}, "test").filter)


@pytest.mark.parametrize(
    ("condition", "passing", "failing"),
    [
        ("zh", ["zh"], ["en", None, "", 1]),
        (1, [1, 1.0, "1"], [True, 2, None]),
        (True, [True], [1, False, "true"]),
        (["zh", 3], ["zh", 3], ["en", None]),
        ("not null", ["", 0, False], [None]),
        (None, [None], ["", 0]),
        ("null", [None], ["null"]),
        ({"min": 0.5}, [0.5, 7, "0.75"], [0.4, None, "text", True, float("nan")]),
        ({"min": 1, "max": 2}, [1, 1.5, 2], [0.9, 2.1, 10**400]),
        ({"differs": "en"}, ["zh", None], ["en"]),
        ({"none_of": ["en", None]}, ["zh"], ["en", None]),
        ({"min_characters": 2, "max_characters": 3}, ["你好", "abc"], ["a", "abcd", None, 12]),
        ({"contains": "cat"}, ["a cat", ["cat"]], ["dog", ["a cat"], None]),
        ({"equals": None}, [None], [0]),
        ({"null": False, "differs": ""}, ["x"], ["", None]),
    ],
)
def test_a_condition_holds_for_what_it_says(condition: Any, passing: list[Any], failing: list[Any]) -> None:
    assert [value for value in passing if not keep({"x": condition}, {"x": value})] == []
    assert [value for value in failing if keep({"x": condition}, {"x": value})] == []


def test_all_conditions_have_to_hold_and_a_missing_column_is_null() -> None:
    assert keep({"a": 1, "b": "null"}, {"a": 1})
    assert not keep({"a": 1, "b": "not null"}, {"a": 1})


def test_a_column_may_lie_inside_of_another() -> None:
    assert keep({"meta.lang": "zh"}, {"meta": {"lang": "zh"}})
    assert keep({"meta.lang": "zh"}, {"meta.lang": "zh", "meta": {"lang": "en"}})
    assert not keep({"meta.lang": "zh"}, {"meta": "zh"})


def test_a_wrong_condition_is_refused() -> None:
    wrong = (({"mim": 1}, "unknown key 'filter.x.mim'"), ({}, "a condition is empty"), ([], "one_of"))
    for condition, problem in wrong:
        with pytest.raises(UsageError, match=problem):
            keep({"x": condition}, {})


def test_every_item_is_equally_likely_to_be_drawn() -> None:
    drawn = Counter(item for seed in range(1000) for item in draw(range(10), 3, seed))
    assert all(240 < drawn[n] < 360 for n in range(10))


def test_a_draw_is_its_seeds() -> None:
    assert draw(range(100), 20, 1) == draw(range(100), 20, 1) != draw(range(100), 20, 2)
    assert sorted(draw(range(5), 20, 0)) == list(range(5))


@pytest.mark.parametrize("condition", ["en", 3, None, "not null", ["a", None], {"min": 3}, {"differs": None}])
def test_what_is_written_down_reads_back_as_the_same_condition(condition: Any) -> None:
    first = Condition.model_validate(condition)
    again = Condition.model_validate(first.model_dump(mode="json"))
    for value in ("en", "a", 3, 2, None):
        assert first.holds(value) == again.holds(value)
    assert (
        Condition.model_validate({"equals": None}).model_dump()
        != Condition.model_validate({"differs": None}).model_dump()
    )
