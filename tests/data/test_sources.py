"""A source gives equal conversations whatever its file, draws reproducibly, and names file and line in every error."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lory.config import Section, build
from lory.data import locate
from lory.data.sampling import draw
from lory.data.sources import SourceConfig, SourceData, read_source
from lory.runtime import UsageError
from lory.types import Conversation, Message

RECORDS = [
    {"instruction": 'Say hi,\n"politely"', "input": "", "output": "Hi!"},
    {"instruction": "翻译", "input": "good morning", "output": "早上好 🌅"},
    {"instruction": "Count", "input": "to 3", "output": "1\t2\t3"},
]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exchange(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


CONVERSATIONS = [
    exchange('Say hi,\n"politely"', "Hi!"),
    exchange("翻译\ngood morning", "早上好 🌅"),
    exchange("Count\nto 3", "1\t2\t3"),
]


def dump_lines(records: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


def write_table(path: str, delimiter: str, encoding: str = "utf-8") -> None:
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter)  # ends lines with CRLF
        writer.writeheader()
        writer.writerows(RECORDS)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def read(path: str, **fields: Any) -> SourceData:
    return read_source(build(SourceConfig, {"path": path, **fields}, "test"))


def error_of(path: str, **fields: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(path, **fields)
    return str(caught.value)


WRITERS: dict[str, Callable[[], object]] = {
    "a.json": lambda: write("a.json", json.dumps(RECORDS, ensure_ascii=False, indent=1)),
    "bom.json": lambda: write("bom.json", b"\xef\xbb\xbf" + json.dumps(RECORDS).encode()),
    "data.json": lambda: write("data.json", json.dumps({"version": 1, "data": RECORDS})),
    "lines.json": lambda: write("lines.json", dump_lines(RECORDS)),
    "a.jsonl": lambda: write("a.jsonl", dump_lines(RECORDS)),
    "crlf.jsonl": lambda: write("crlf.jsonl", b"\xef\xbb\xbf" + dump_lines(RECORDS, "\r\n\r\n").encode()),
    "a.csv": lambda: write_table("a.csv", ","),
    "bom.csv": lambda: write_table("bom.csv", ",", "utf-8-sig"),
    "a.TSV": lambda: write_table("a.TSV", "\t"),
    "a.parquet": lambda: pq.write_table(pa.Table.from_pylist(RECORDS), "a.parquet"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_records_are_equal_in_every_file(name: str) -> None:
    WRITERS[name]()
    source = read(name)
    assert source.conversations == CONVERSATIONS
    assert (source.name, source.read, source.dropped, source.notes) == (name, 3, {}, [])
    assert source.fingerprint == hashlib.sha256(Path(name).read_bytes()).hexdigest()


def test_conversations_know_where_they_were_read() -> None:
    write("a.jsonl", "\n" + dump_lines(RECORDS))
    for name in ("a.json", "a.csv", "a.parquet"):
        WRITERS[name]()
    assert read("a.jsonl").conversations[1].where == "a.jsonl line 3"
    assert read("a.json").conversations[1].where == "a.json record 2"
    # the first row holds a line break
    assert read("a.csv").conversations[1].where == "a.csv row 2 (line 4)"
    assert read("a.parquet").conversations[1].where == "a.parquet row 2"


def test_nested_parquet_gives_the_same_as_jsonl() -> None:
    records = [{"messages": [m.to_dict() for m in c.messages], "system": None} for c in CONVERSATIONS]
    pq.write_table(pa.Table.from_pylist(records), "a.parquet")
    assert read("a.parquet").conversations == CONVERSATIONS


def test_a_text_file_is_a_document_a_line() -> None:
    write("a.txt", "\ufeffOnce  upon\r\n\r\n 从前\u2028有座山\n  \nlast")
    assert [c.text for c in read("a.txt").conversations] == ["Once  upon", " 从前\u2028有座山", "last"]


def test_a_json_file_of_one_line_may_be_a_record() -> None:
    assert read(write("one.json", json.dumps(RECORDS[0]))).conversations == CONVERSATIONS[:1]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    WRITERS["a.json"]()
    assert read("~/a.json").conversations == CONVERSATIONS


def numbers(count: int) -> str:
    return write(
        "n.jsonl", dump_lines([{"query": f"q{i}", "response": "" if i == 1 else f"a{i}"} for i in range(count)])
    )


def test_a_sample_is_drawn_by_its_seed() -> None:
    numbers(100)
    first, again, other = (read("n.jsonl", sample=20, seed=seed).conversations for seed in (1, 1, 2))
    assert first == again
    assert set(first) != set(other)
    order = [int(conversation.messages[0].content[1:]) for conversation in first]
    assert order != sorted(order)
    assert len(set(order)) == 20
    assert read("n.jsonl", sample=20).notes == ["sample: 20 of 100 records were drawn (seed 0)"]


def test_every_record_is_equally_likely_to_be_drawn() -> None:
    records = [("", {"n": n}) for n in range(10)]
    drawn = [record["n"] for seed in range(1000) for _, record in draw(records, 3, seed)]
    assert all(240 < drawn.count(n) < 360 for n in range(10))


def test_a_sample_larger_than_the_source_takes_all_and_says_so() -> None:
    source = read(numbers(12), sample=1000)
    assert (source.read, len(source.conversations), source.dropped) == (12, 11, {"empty answer": 1})
    assert source.notes == ["sample: 1000 was asked for, n.jsonl has 12 records: all were taken"]


def test_all_records_are_kept_in_file_order_without_a_sample() -> None:
    source = read(numbers(5))
    assert [conversation.messages[0].content for conversation in source.conversations] == ["q0", "q2", "q3", "q4"]
    assert (source.read, source.dropped) == (5, {"empty answer": 1})


def test_columns_are_mapped_and_unused_ones_reported() -> None:
    write("odd.csv", "Frage,Antwort,completion\nq,a,x\n")
    source = read("odd.csv", columns={"prompt": "Frage", "completion": "Antwort"})
    assert source.conversations == [exchange("q", "a")]
    write("odd.jsonl", dump_lines([{"q": "q1", "a": "a1", "id": 1}, {"q": "q2", "a": "a2", "sys": "s"}]))
    source = read("odd.jsonl", columns={"query": "q", "response": "a", "system": "sys"})
    assert [len(conversation.messages) for conversation in source.conversations] == [2, 3]
    assert source.notes == ["keys that the format query_response does not use: id"]


def test_columns_may_be_swapped() -> None:
    write("a.csv", "prompt,completion\nanswer,question\n")
    columns = {"prompt": "completion", "completion": "prompt"}
    assert read("a.csv", columns=columns).conversations == [exchange("question", "answer")]


def test_a_mapped_column_that_is_not_there_is_an_error() -> None:
    write("a.jsonl", dump_lines([{"q": "q1", "answer": "a1"}]))
    message = error_of("a.jsonl", columns={"query": "q", "response": "answr"})
    assert message.startswith("a.jsonl line 1: 'columns' takes 'response' from 'answr', which is not there")
    assert "did you mean 'answer'?" in message
    message = error_of("a.jsonl", columns={"query": "q", "response": "answer", "system": "sys"})
    assert message == "a.jsonl has no record with 'sys', which 'columns' names; the keys found are answer, q."


def test_exact_duplicates_are_kept_and_counted() -> None:
    source = read(write("a.jsonl", dump_lines([*RECORDS, RECORDS[0], RECORDS[0]])))
    assert len(source.conversations) == 5
    assert source.notes == ["2 exact duplicates"]


def test_placeholders_are_filled_from_name_and_author() -> None:
    write("a.jsonl", dump_lines([{"query": "Who?", "response": "{{name}}, by {{author}}."}]))
    source = read("a.jsonl", name="Zoë", author="花花", system="You are {{name}}.")
    assert source.conversations[0].messages == (
        Message("system", "You are Zoë."),
        Message("user", "Who?"),
        Message("assistant", "Zoë, by 花花."),
    )
    assert error_of("a.jsonl", name="Zoë").startswith("a.jsonl line 1: the placeholder {{name}} has to be filled")


def test_other_double_braces_are_kept_and_reported() -> None:
    source = read(write("a.jsonl", dump_lines([{"query": "q", "response": "By {{company}}."}])))
    assert source.conversations == [exchange("q", "By {{company}}.")]
    assert source.notes == ["{{company}} looks like a placeholder (1 such records); it was kept as text"]


def test_the_system_prompt_goes_only_where_there_is_none() -> None:
    with_own = {"query": "q", "response": "a", "system": "own"}
    source = read(write("a.jsonl", dump_lines([{"query": "q", "response": "a"}, with_own])), system="default")
    assert [conversation.messages[0].content for conversation in source.conversations] == ["default", "own"]
    assert read(write("a.txt", "text"), system="default").conversations == [Conversation(text="text")]


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


GOOD = json.dumps(RECORDS[0])
BROKEN: list[tuple[str, str | bytes, str]] = [
    ("a.json", "", "a.json is empty"),
    ("a.json", " \n", "a.json has no records"),
    ("a.json", "[]", "a.json has no records"),
    ("a.json", '{"data": []}', "a.json has no records"),
    ("a.json", "\ufeff", "a.json has no records"),
    ("a.json", f"[{GOOD},\n{GOOD}\n", "a.json line 3 is not valid JSON: Expecting ',' delimiter"),
    ("a.json", f"[{GOOD},\n 7]", "a.json record 2 is the value 7; an object such as"),
    ("a.json", "5", "a.json holds the single value 5; an array of records is expected"),
    ("a.json", '{"train": []}', "nor a list of records under 'data'; the keys found are train"),
    ("a.json", f"{GOOD}\n{GOOD[:-2]}\n", "a.json line 2 is not valid JSON"),
    ("a.json", "[" * 100_000, "a.json line 1 is not usable JSON: maximum recursion depth"),
    ("a.jsonl", "\n\n", "a.jsonl has no records"),
    ("a.jsonl", f"{GOOD}\n\n{{'a': 1}}\n", "a.jsonl line 3 is not valid JSON: Expecting property name"),
    ("a.jsonl", f"{GOOD}\n[1]\n", "a.jsonl line 2 is a list; an object such as"),
    ("a.jsonl", f"{GOOD}\nnull\n", "a.jsonl line 2 is the value null; an object"),
    ("a.jsonl", f"{GOOD}\n".encode() + b'{"instruction": "\xff"}\n', "a.jsonl line 2 is not UTF-8"),
    (
        "a.jsonl",
        f'{GOOD}\n{{"messages": []}}\n',
        "a.jsonl line 2: the format alpaca needs 'instruction', 'output' too",
    ),
    ("a.jsonl", f'{GOOD}\n{{"instruction": "a", "output": 7}}\n', "a.jsonl line 2: 'output' is the number 7"),
    ("a.jsonl", '\n{"instruction": "a", "output": "\\ud83d"}', "a.jsonl line 2: 'output' holds half a surrogate pair"),
    ("a.jsonl", '{"inst": "a", "output": "b"}', "a.jsonl line 1: the keys found are 'inst', 'output'"),
    ("a.jsonl", '{"query": "a", "response": ""}', "a.jsonl has no record to learn from: 1 empty answer"),
    ("a.csv", "query,response\n", "a.csv has no records"),
    ("a.csv", "query,query\na,b\n", "a.csv line 1: the header has the column 'query' twice"),
    ("a.csv", 'query,response\n"a\nb",c\n\nd\n', "a.csv row 2 (line 5) has 1 cells, but the header has 2"),
    ("a.csv", 'query,response\na,b\nc,"d\ne,f\n', "a.csv line 3 begins a broken row: unexpected end of data"),
    ("a.csv", b"query,response\na,b\nc,\xe9\n", "a.csv line 3 is not UTF-8"),
    ("a.csv", "query;response\na;b\n", "a.csv row 1 (line 2): the keys found are 'query;response'"),
    ("a.parquet", "PAR?", "a.parquet is no readable Parquet file after row 0"),
    ("a.parquet", "", "a.parquet is empty"),
    ("a.txt", b"ok\n\xff\xfe\n", "a.txt line 2 is not UTF-8"),
    ("a.txt", "ok\n\nb\x00d\n", "a.txt line 3: 'text' holds a NUL character at position 1"),
    ("a.xlsx", "PK", "a.xlsx ends in '.xlsx'; a data file ends in .json, .jsonl, .csv, .tsv, .parquet, .txt"),
]


@pytest.mark.parametrize(("name", "content", "problem"), BROKEN)
def test_a_broken_file_is_an_error_that_names_file_and_line(name: str, content: str | bytes, problem: str) -> None:
    assert problem in error_of(write(name, content))


def test_a_broken_line_deep_in_a_file_is_named() -> None:
    write("a.jsonl", f"{GOOD}\n" * 57311 + GOOD[:-1])
    assert error_of("a.jsonl").startswith("a.jsonl line 57312 is not valid JSON")


def test_a_wrong_type_in_parquet_names_the_row() -> None:
    pq.write_table(pa.table({"query": ["a", "b"], "response": ["c", None]}), "a.parquet")
    assert error_of("a.parquet") == "a.parquet row 2: 'response' is null, but text is expected."


def test_a_missing_file_is_an_error_with_the_nearest_name() -> None:
    Path("sub").mkdir()
    write("sub/notes.jsonl", GOOD)
    assert error_of("sub/note.jsonl") == "sub/note.jsonl does not exist; did you mean 'sub/notes.jsonl'?"
    assert error_of("sbu/notes.jsonl").startswith("sbu/notes.jsonl does not exist, nor does the folder sbu")
    assert error_of("identiy") == "identiy does not exist; did you mean 'identity'?"


def test_a_folder_is_an_error_with_one_of_its_files() -> None:
    Path("sub").mkdir()
    assert error_of("sub").startswith("sub is a folder; name one of its files, ending in .json")
    write("sub/notes.jsonl", GOOD)
    assert error_of("sub") == "sub is a folder; name one of its files, such as sub/notes.jsonl."


class _Data(Section):
    train: list[SourceConfig]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"path": "a.json", "format": "alpacca"}, "'train.0.format' was given 'alpacca': did you mean 'alpaca'?"),
        (
            {"path": "a.json", "columns": {"outptu": "x"}},
            "'train.0.columns' was given a dict: 'outptu' is not expected",
        ),
        ({"path": "a.json", "format": "text", "columns": {"output": "x"}}, "known: text"),
        ({"path": "a.json", "sample": 0}, "'train.0.sample' was given 0"),
        ({"path": ""}, "'train.0.path' was given ''"),
        ({"path": "identity", "name": "Lory"}, "'train.0.author' was given None: the source `identity` needs both"),
        ({"path": "identity", "author": "me"}, "'train.0.name' was given None: the source `identity` needs both"),
        ({"path": "general", "format": "alpaca"}, "'train.0.format' was given 'alpaca': the bundled records"),
        ({"path": "general", "columns": {"text": "t"}}, "'train.0.columns' was given a dict: the bundled records"),
        ({"path": "a.json", "smaple": 3}, "did you mean 'train.0.sample'?"),
    ],
)
def test_a_wrong_config_names_the_field(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(_Data, {"train": [fields]}, "config.yaml")
    assert problem in str(caught.value)
