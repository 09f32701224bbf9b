"""The short form of a source is equal to a long one, and a file's name is never taken apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lory.config import Section, build
from lory.data.sources.config import SourceConfig
from lory.runtime import UsageError


class _Data(Section):
    train: list[SourceConfig]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(source: Any) -> SourceConfig:
    return build(_Data, {"train": [source]}, "test").train[0]


SHORT: list[tuple[str, dict[str, Any]]] = [
    ("a.jsonl", {"path": "a.jsonl"}),
    ("a.jsonl#500", {"path": "a.jsonl", "sample": 500}),
    ("general", {"path": "general"}),
    ("general#50", {"path": "general", "sample": 50}),
    ("data/*.jsonl#5", {"path": "data/*.jsonl", "sample": 5}),
    ("owner/name", {"path": "owner/name"}),
    ("owner/name:zh#2000", {"path": "owner/name", "subset": "zh", "sample": 2000}),
    (
        "AI-ModelScope/alpaca-gpt4-data-zh#500",
        {"path": "AI-ModelScope/alpaca-gpt4-data-zh", "sample": 500},
    ),
    ("HF::owner/name", {"path": "owner/name", "source": "hf"}),
    ("MS::owner/name:a/b#3", {"path": "owner/name", "source": "modelscope", "subset": "a/b", "sample": 3}),
    ("https://host:81/a.jsonl", {"path": "https://host:81/a.jsonl"}),
    ("https://host/a.jsonl#7", {"path": "https://host/a.jsonl", "sample": 7}),
    (r"C:\data\a.jsonl", {"path": r"C:\data\a.jsonl"}),
    ("a.jsonl#last", {"path": "a.jsonl#last"}),
    ("lf/dataset_info.json:en#100", {"path": "lf/dataset_info.json", "dataset": "en", "sample": 100}),
    ("lf:en", {"path": "lf", "dataset": "en"}),
    ("lf:folder", {"path": "lf", "subset": "folder"}),
    ("taken#3", {"path": "taken#3"}),
    ("taken#3#4", {"path": "taken#3", "sample": 4}),
    ("taken:zh", {"path": "taken:zh"}),
    ("taken:zh#4", {"path": "taken:zh", "sample": 4}),
]


@pytest.mark.parametrize(("short", "long"), SHORT, ids=[short for short, _ in SHORT])
def test_the_short_form_is_equal_to_the_long_one(short: str, long: dict[str, Any]) -> None:
    Path("lf").mkdir()
    Path("lf/dataset_info.json").write_text(json.dumps({"en": {"file_name": "en.json"}}))
    for name in ("taken#3", "taken:zh"):
        Path(name).touch()
    assert load(short) == load(long)


def test_the_schema_allows_both_forms() -> None:
    forms = _Data.model_json_schema()["$defs"]["SourceConfig"]["anyOf"]
    assert [form["type"] for form in forms] == ["string", "object"]
    assert "path" in forms[1]["properties"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "'train.0.path' was given ''"),
        ("identity", "the source `identity` needs both a name and an author"),
        ("a#0", "'train.0.sample' was given 0"),
        ({"path": "a", "split": "train["}, "a split is a name, a slice or both"),
        ({"path": "general", "subset": "x"}, "the bundled records of 'general' have no subset"),
        ({"path": "a", "dataset": "x", "columns": {"text": "t"}}, "dataset_info.json says format and columns"),
        ({"path": "a", "source": "github"}, "'train.0.source' was given 'github'"),
        ({"path": "a", "weight": 0}, "'train.0.weight' was given 0"),
        ({"path": "a", "filter": {"x": {"mni": 3}}}, "unknown key 'train.0.filter.x.mni'"),
        ({"path": "a", "format": "my:read", "columns": {"text": "t"}}, "is given the columns as they are"),
        ({"path": "a", "on_bad": "skip"}, "'train.0.on_bad' was given 'skip'"),
        (5, "'train.0' was given 5"),
    ],
)
def test_a_wrong_source_names_the_field(source: Any, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(source)
    assert problem in str(caught.value)
