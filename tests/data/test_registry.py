"""Data sets have names, a user's own among them; what is wrong in a registry is named with file and entry."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lory.data.records.formats import FORMATS, convert, recognise
from lory.data.sources.config import SourceConfig
from lory.data.sources.registry import ENVIRONMENT, describe_registry, find, load_function, load_registry
from lory.runtime import UsageError

MINE = "mine:\n  description: My records\n  path: records.jsonl\n"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No registry of the person who runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# The bundled ones


def test_each_bundled_data_set_is_a_source_and_runs_no_code() -> None:
    registry = load_registry()
    assert len(registry) >= 50
    for name, entry in registry.items():
        source = SourceConfig(**entry.source())
        assert source.path in (entry.hf, entry.modelscope), name
        assert entry.format in FORMATS, name
        assert entry.path is None, name
        assert entry.tags, name


def test_a_bundled_data_set_is_read_as_its_page_shows_it() -> None:
    rows = {
        "dolly": {"instruction": "When?", "context": "It was 1999.", "response": "In 1999.", "category": "closed_qa"},
        "gsm8k": {"question": "2 + 2?", "answer": "It is 4.\n#### 4"},
        "firefly": {"kind": "Couplet", "input": "上联", "target": "下联"},
        "openorca": {"id": "a", "system_prompt": "Be brief.", "question": "Why?", "response": "So."},
        "e2e": {"meaning_representation": "name[Aromi]", "human_reference": "Aromi is a place."},
        "ultrafeedback": {
            "prompt": "Hi",
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}],
        },
        "orca-dpo-pairs": {"system": "", "question": "Hi", "chosen": "Hello!", "rejected": "What?"},
        "glue-sst2": {"sentence": "A gripping film.", "label": 1, "idx": 7},
    }
    for name, row in rows.items():
        entry = load_registry()[name]
        assert set(entry.columns.values()) <= set(row), name
        record = dict(row) | {key: row[own] for key, own in entry.columns.items()}
        assert convert(record, entry.format, name)
        if not entry.columns:
            assert recognise(row) == entry.format, name


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("glue-cola", ["sentence"]),
        ("glue-mrpc", ["sentence1", "sentence2"]),
        ("glue-qqp", ["question1", "question2"]),
        ("glue-mnli", ["premise", "hypothesis"]),
        ("glue-qnli", ["question", "sentence"]),
    ],
)
def test_a_task_of_glue_is_recognised_by_its_columns(name: str, columns: list[str]) -> None:
    assert recognise(dict.fromkeys(columns, "It rains.") | {"label": 0, "idx": 7}) == load_registry()[name].format


def test_formulas_are_asked_for_in_the_words_of_the_field() -> None:
    entry = find("latex-ocr-handwrite")
    assert entry is not None
    assert entry.source("modelscope") == {
        "source": "modelscope",
        "path": "AI-ModelScope/LaTeX_OCR",
        "subset": "human_handwrite",
        "split": "train",
        "format": "image_text",
        "question": "Using LaTeX to perform OCR on the image.",
    }


def test_a_revision_is_of_the_hub_that_comes_first() -> None:
    entry = find("e2e")
    assert entry is not None
    assert entry.source()["revision"] == "refs/convert/parquet"
    with pytest.raises(UsageError, match=r"not known where .* on modelscope; it is 'tuetschek/e2e_nlg'"):
        entry.source("modelscope")


def test_what_is_no_name_is_not_found() -> None:
    assert find("alpaca") is not None
    for name in ("no-such-set", "tatsu-lab/alpaca", "alpaca.json", "", "../alpaca", "data/*.jsonl"):
        assert find(name) is None


# A user's own


def test_a_users_own_registry_is_found_in_its_usual_place_by_the_environment_and_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "config" / "lory" / "registry.yaml", MINE)
    first = write(tmp_path / "a" / "one.yaml", MINE.replace("mine", "one"))
    second = write(tmp_path / "b" / "two.yaml", MINE.replace("mine", "two"))
    third = write(tmp_path / "c" / "three.yaml", MINE.replace("mine", "three"))
    monkeypatch.setenv(ENVIRONMENT, os.pathsep.join([str(first), str(second)]))

    registry = load_registry([third])

    assert {"mine", "one", "two", "three", "alpaca"} <= set(registry)
    # relative to the registry that names it
    assert registry["one"].source() == {"path": str(tmp_path / "a" / "records.jsonl"), "format": "auto"}


def test_a_later_registry_wins(tmp_path: Path) -> None:
    first = write(tmp_path / "one.yaml", "alpaca: {description: Mine, hf: me/alpaca}\n")
    second = write(tmp_path / "two.yaml", "alpaca: {description: Ours, hf: us/alpaca}\n")
    found = find("alpaca", [first, second])
    assert found is not None
    assert found.hf == "us/alpaca"


def test_an_own_entry_may_name_a_function_and_any_place(tmp_path: Path) -> None:
    text = (
        "parsed: {description: d, path: /data/x.csv, format: 'my_data:read'}\n"
        "web: {description: d, path: 'https://example.org/a.jsonl', format: alpaca, columns: {input: context}}\n"
        "there: {description: d, modelscope: me/set, revision: v2, split: test}\n"
    )
    registry = load_registry([write(tmp_path / "own.yaml", text)])
    assert registry["parsed"].source() == {"path": "/data/x.csv", "format": "my_data:read"}
    assert registry["web"].source()["path"] == "https://example.org/a.jsonl"
    assert registry["there"].source() == {
        "source": "modelscope",
        "path": "me/set",
        "revision": "v2",
        "split": "test",
        "format": "auto",
    }


BAD = {
    "no place": ("x: {description: d}", "entry 'x': .*give hf, modelscope or path"),
    "two places": ("x: {description: d, path: a, hf: a/b}", "entry 'x': .*use one of them"),
    "no description": ("x: {hf: a/b}", "entry 'x': 'description' is missing"),
    "unknown field": ("x: {description: d, hf: a/b, colums: {}}", "entry 'x': unknown key 'colums'; .*'columns'"),
    "unknown format": ("x: {description: d, hf: a/b, format: alpacca}", "entry 'x': .*did you mean 'alpaca'"),
    "unknown column": (
        "x: {description: d, hf: a/b, format: alpaca, columns: {query: q}}",
        "entry 'x': .*expects no 'query'",
    ),
    "no id": ("x: {description: d, hf: b}", "entry 'x': 'hf' was given 'b': owner/name"),
    "a subset that is not there": ("x: {description: d, hf: a/b, subsets: [c]}", "entry 'x': .*not among c"),
    "no mapping": ("x: a/b", "entry 'x' is no mapping"),
    "a path for a name": ("a/b: {description: d, hf: a/b}", "entry 'a/b': a name has letters"),
    "a number for a name": ("7: {description: d, hf: a/b}", "entry '7': a name has letters"),
    "twice": ("x: {description: d, hf: a/b}\nx: {description: d, hf: a/b}", "'x' stands twice"),
    "no YAML": ("x: {", "is not valid YAML"),
    "a list": ("- x", "a mapping"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_named_with_file_and_entry(kind: str, tmp_path: Path) -> None:
    text, reason = BAD[kind]
    path = write(tmp_path / "own.yaml", text + "\n")
    with pytest.raises(UsageError, match=reason) as caught:
        load_registry([path])
    assert str(caught.value).startswith(str(path))


def test_a_registry_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "none.yaml"))
    with pytest.raises(UsageError, match=r"none\.yaml: No such file"):
        find("alpaca")


def test_data_sets_are_listed_by_name_tag_and_description(tmp_path: Path) -> None:
    assert {row["name"] for row in describe_registry("glue-*")} == {
        f"glue-{task}" for task in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
    }
    assert "hh-rlhf" in {row["name"] for row in describe_registry("Preference")}
    assert [row["name"] for row in describe_registry("restaurants")] == ["e2e"]
    assert describe_registry("no such thing") == []
    own = write(tmp_path / "own.yaml", MINE)
    assert len(describe_registry("", [own])) == len(load_registry()) + 1
    assert describe_registry("mine", [own]) == [
        {
            "name": "mine",
            "description": "My records",
            "hf": None,
            "modelscope": None,
            "path": str(tmp_path / "records.jsonl"),
            "tags": [],
            "license": None,
        }
    ]


# Functions

CODE = """
def read_record(record):
    return {"messages": [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]}

NUMBER = 7
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_is_imported_from_the_working_directory(workplace: Path) -> None:
    write(workplace / "my_records.py", CODE)
    write(workplace / "my_package" / "inner.py", CODE)
    for spec in ("my_records:read_record", "my_package.inner:read_record"):
        read = load_function(spec)
        assert read({"q": "Hi", "a": "Hello!"})["messages"][1] == {"role": "assistant", "content": "Hello!"}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("my_records", "names no function; module:function is expected"),
        ("my records:read", "names no function"),
        ("../my_records:read", "names no function"),
        ("no_records:read", r"there is no no_records\.py in .* and no module no_records"),
        ("my_records.inner:read", r"there is no my_records/inner\.py"),
        ("my_records:read_records", r"has no function 'read_records'; did you mean 'read_record'\?"),
        ("my_records:write", "has no function 'write'; its functions are read_record"),
        ("my_records:NUMBER", "has no function 'NUMBER'"),
        ("broken:read", r"could not be imported: .*broken\.py, line 1"),
        ("needs:read", "the module needs needs no_such_module_at_all, which is not installed"),
    ],
)
def test_a_function_that_is_not_there_is_refused(spec: str, reason: str, workplace: Path) -> None:
    write(workplace / "my_records.py", CODE)
    write(workplace / "broken.py", "def read(:\n")
    write(workplace / "needs.py", "import no_such_module_at_all\n")
    with pytest.raises(UsageError, match=reason):
        load_function(spec)
