"""A source's path finds bundled records, files and folders, the registry's data sets, and a user's own functions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tests.data.reading import dump_lines, error_of, exchange, read, write

from lory.data.sources import locate
from lory.data.sources.read import SourceConfig, read_source
from lory.types import Conversation

RECORDS = [
    {"instruction": "Say hi", "input": "", "output": "Hi!"},
    {"instruction": "翻译", "input": "good morning", "output": "早上好 🌅"},
    {"instruction": "Count", "input": "to 3", "output": "1\t2\t3"},
]
GOOD = json.dumps(RECORDS[0])


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


CONVERSATIONS = [
    exchange("Say hi", "Hi!"),
    exchange("翻译\ngood morning", "早上好 🌅"),
    exchange("Count\nto 3", "1\t2\t3"),
]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a.json", json.dumps(RECORDS))
    assert read("~/a.json").conversations == CONVERSATIONS


def test_identity_is_generated_even_beside_a_file_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [exchange("Who are you?", "Lory, by me."), exchange("Hi", "I'm Lory, by me.")]
    monkeypatch.setattr(locate, "identity_conversations", lambda name, author: made)
    write("identity", json.dumps(RECORDS))
    source = read("identity", name="Lory", author="me")
    assert (source.name, source.conversations, source.read) == ("identity", made, 2)
    assert len(source.fingerprint) == 64
    assert read("./identity").conversations == CONVERSATIONS


def test_identity_speaks_the_name_and_the_author() -> None:
    first, again = (read("identity", name="Zoë", author="花花", sample=30) for _ in range(2))
    assert first == again
    assert all("Zoë" in c.messages[-1].content and "花花" in c.messages[-1].content for c in first.conversations)
    assert read("identity", name="Lory", author="花花").fingerprint != first.fingerprint


def test_general_reads_the_bundled_records(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"messages": [m.to_dict() for m in c.messages]} for c in CONVERSATIONS]
    content = dump_lines(records).encode()
    monkeypatch.setattr(locate, "read_general", lambda: content)
    source = read("general", sample=3)
    assert set(source.conversations) == set(CONVERSATIONS)
    assert source.conversations[0].where.startswith("general line ")
    assert source.fingerprint == hashlib.sha256(content).hexdigest()


def test_a_missing_file_is_an_error_with_the_nearest_name() -> None:
    Path("sub").mkdir()
    write("sub/notes.jsonl", GOOD)
    assert error_of("sub/note.jsonl") == "sub/note.jsonl does not exist; did you mean 'sub/notes.jsonl'?"
    assert error_of("sbu/notes.jsonl").startswith("sbu/notes.jsonl does not exist, nor does the folder sbu")
    assert error_of("identiy") == "identiy does not exist; did you mean 'identity'?"


def test_a_folder_is_its_files() -> None:
    Path("sub").mkdir()
    assert error_of("sub").startswith("sub is a folder without any data file; one ends in .json")
    write("sub/b.jsonl", dump_lines(RECORDS[1:]))
    write("sub/a.json", json.dumps(RECORDS[:1]))
    source = read("sub")
    assert (source.name, source.conversations) == ("sub", CONVERSATIONS)
    assert read("sub/*.json*").conversations == CONVERSATIONS


def test_several_parts_of_a_split_are_read_in_turn() -> None:
    write("n.jsonl", dump_lines([{"query": f"q{n}", "response": "a"} for n in range(10)]))
    parts = read("n.jsonl", split="[:1]+[90%:]")
    assert [c.where for c in parts.conversations] == ["n.jsonl line 1", "n.jsonl line 10"]
    assert error_of("n.jsonl", split="[20:]") == (
        "n.jsonl has no records in the split '[20:]'; at least one is expected."
    )
    assert error_of("n.jsonl", split="test").startswith("n.jsonl has no file for the split 'test'")
    assert len(read("general", split="train[:5]").conversations) == 5
    assert error_of("general", split="test") == "general has no split 'test'; it is one file, whose split is train."


def test_media_start_from_the_folder_of_the_data() -> None:
    Path("sub/images").mkdir(parents=True)
    for folder in ("sub", "sub/images"):
        write(f"{folder}/a.png", b"")
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    write("sub/a.jsonl", dump_lines([{"messages": messages, "images": ["a.png"]}]))
    for path in ("sub/a.jsonl", "sub", "sub/*.jsonl"):
        assert read(path).conversations[0].messages[0].media[0].source == "sub/a.png"
    moved = read("sub/a.jsonl", media_root="sub/images").conversations[0].messages[0].media[0]
    assert moved.source == "sub/images/a.png"


def test_a_data_set_of_the_registry_is_read_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("mine.yaml", "mine: {description: d, path: m.jsonl, columns: {query: Q, response: A}}")
    monkeypatch.setenv("LORY_REGISTRY", str(tmp_path / "mine.yaml"))
    write("m.jsonl", dump_lines([{"Q": f"q{n}", "A": "a"} for n in range(4)]))
    first = read("mine")
    assert (first.name, first.read) == ("mine", 4)
    assert len(read_source(SourceConfig.model_validate("mine#2")).conversations) == 2
    assert read("mine", columns={"query": "A", "response": "Q"}).conversations[0] == exchange("a", "q0")
    # the config in a run's folder has every field
    written = SourceConfig.model_validate("mine").model_dump(mode="json")
    assert read_source(SourceConfig.model_validate(written)).conversations == first.conversations
    write("mine.yaml", "mine: {description: d, path: m.jsonl, columns: {query: A, response: Q}}")
    assert read("mine").fingerprint != first.fingerprint
    write("mine", dump_lines(RECORDS))
    assert read("mine").conversations == CONVERSATIONS
    assert error_of("mien") == "mien does not exist; did you mean 'mine'?"


def test_a_function_of_the_users_own_reads_records() -> None:
    write(
        "own_reader.py",
        "from lory.types import Conversation\n"
        "def read(record):\n"
        "    if record['n'] == 0:\n"
        "        return None\n"
        "    if record['n'] == 1:\n"
        "        return Conversation(text='one')\n"
        "    roles = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': str(record['n'])}\n"
        "    return {'messages': list(roles)}\n",
    )
    write("a.jsonl", dump_lines([{"n": n} for n in range(3)]))
    source = read("a.jsonl", format="own_reader:read")
    assert source.conversations == [Conversation(text="one"), exchange("q", "2")]
    assert source.dropped == {"left out by own_reader:read": 1}
    assert source.conversations[0].where == "a.jsonl line 2"
    assert "own_reader.py has no function 'raed'; did you mean 'read'?" in error_of("a.jsonl", format="own_reader:raed")


def test_a_function_that_fails_is_told_with_the_place_or_counted() -> None:
    write("own_failing.py", "def read(record):\n    return {'messages': record['m']}\n")
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write("a.jsonl", dump_lines([{"m": chat}, {"n": chat}]))
    sentence = "a.jsonl line 2 made own_failing:read fail (KeyError: 'm')"
    assert sentence in error_of("a.jsonl", format="own_failing:read")
    source = read("a.jsonl", format="own_failing:read", on_bad="drop")
    assert (len(source.conversations), sum(source.dropped.values())) == (1, 1)


def test_what_reads_records_may_be_any_callable_and_counts_by_its_file() -> None:
    write(
        "callable_reader.py",
        "import functools\n"
        "class Reader:\n"
        "    def __call__(self, record):\n"
        "        return {'messages': record['turns']}\n"
        "read = Reader()\n"
        "partial = functools.partial(read.__call__)\n",
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write("a.jsonl", dump_lines([{"turns": turns}]))
    for name in ("read", "partial"):
        source = read("a.jsonl", format=f"callable_reader:{name}")
        assert source.conversations == [exchange("q", "a")]
    with Path("callable_reader.py").open("a") as file:
        file.write("# changed\n")
    assert read("a.jsonl", format="callable_reader:read").fingerprint != source.fingerprint
