"""A source gives equal conversations whatever its file, draws reproducibly, and names file and line in every error."""

from __future__ import annotations

import csv
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.reading import dump_lines, error_of, exchange, read, write

from lory.config import Section, build
from lory.data.sources.read import (
    SourceConfig,
    SourceReader,
    explain_source,
    open_source,
)
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


CONVERSATIONS = [
    exchange('Say hi,\n"politely"', "Hi!"),
    exchange("翻译\ngood morning", "早上好 🌅"),
    exchange("Count\nto 3", "1\t2\t3"),
]


def write_table(path: str, delimiter: str, encoding: str = "utf-8") -> None:
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter=delimiter)  # ends lines with CRLF
        writer.writeheader()
        writer.writerows(RECORDS)


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
    ("a.xlsx", "PK", "a.xlsx ends in '.xlsx'; a data file ends in .json, .jsonl"),
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


def test_the_filter_is_counted_and_comes_before_the_draw() -> None:
    write("a.jsonl", dump_lines([{"query": f"q{n}", "response": "a", "score": n / 10} for n in range(10)]))
    source = read("a.jsonl", filter={"score": {"min": 0.5}})
    assert [c.messages[0].content for c in source.conversations] == ["q5", "q6", "q7", "q8", "q9"]
    assert (source.read, source.dropped, source.notes) == (10, {"does not pass the filter": 5}, [])
    drawn = read("a.jsonl", filter={"score": {"min": 0.5}}, sample=7)
    assert len(drawn.conversations) == 5
    assert drawn.notes == ["sample: 7 was asked for, a.jsonl has 5 records: all were taken"]
    assert error_of("a.jsonl", filter={"score": 7}) == (
        "a.jsonl has no record to learn from: 10 does not pass the filter."
    )
    assert error_of("a.jsonl", filter={"scor": 1}).startswith("a.jsonl has no record with 'scor', which 'filter' names")


BAD = [
    {"query": "q1", "response": "a1"},
    {"query": "q2", "response": 7},
    [1],
    {"query": "q3", "response": 8},
    {"query": "q4"},
    {"query": "q5", "response": "\ud83d"},
    {"query": "q6", "response": ""},
    {"query": "q7", "response": "a7"},
]


def test_bad_records_are_dropped_and_counted_where_that_is_wanted() -> None:
    write("a.jsonl", "".join(json.dumps(record) + "\n" for record in BAD))
    assert error_of("a.jsonl").startswith("a.jsonl line 2: 'response' is the number 7")
    source = read("a.jsonl", on_bad="drop")
    assert [c.messages[0].content for c in source.conversations] == ["q1", "q7"]
    assert (source.read, sum(source.dropped.values())) == (8, 6)
    assert source.dropped["malformed: 'response' is the number #, but text is expected"] == 2
    assert source.dropped["empty answer"] == 1
    assert source.notes[0] == (
        "malformed: 'response' is the number #, but text is expected: 2; "
        "the first is: a.jsonl line 2: 'response' is the number 7, but text is expected."
    )
    assert len(source.notes) == 4


def test_a_broken_file_is_an_error_even_where_bad_records_are_dropped() -> None:
    write("a.jsonl", f"{GOOD}\n{GOOD[:-1]}\n")
    assert error_of("a.jsonl", on_bad="drop").startswith("a.jsonl line 2 is not valid JSON")
    write("b.jsonl", '{"a": 1}\n{"b": 1}\n')
    message = error_of("b.jsonl", on_bad="drop")
    assert message.startswith("b.jsonl has no record to learn from: 1 malformed: the keys found are 'a'")


def test_the_kinds_of_bad_records_that_are_told_apart_are_limited() -> None:
    bad = [{"query": "q", "response": None, f"{chr(97 + n // 26)}{chr(97 + n % 26)}": 1} for n in range(100)]
    lines = [{"query": "q", "response": "a"}, *({key: 1 for key in record if len(key) == 2} for record in bad)]
    write("a.jsonl", dump_lines(lines))
    source = read("a.jsonl", on_bad="drop")
    assert len(source.dropped) == 21
    assert source.dropped["malformed in another way"] == 80


def test_a_ragged_row_is_a_bad_record() -> None:
    write("a.csv", "query,response\na,b\nc\n")
    assert error_of("a.csv") == "a.csv row 2 (line 3) has 1 cells, but the header has 2."
    assert read("a.csv", on_bad="drop").dropped == {"malformed: has # cells, but the header has #": 1}


def open_(path: str, start: int = 0, **fields: Any) -> SourceReader:
    return open_source(build(SourceConfig, {"path": path, **fields}, "test"), start)


def test_a_reader_gives_conversations_as_they_are_asked_for() -> None:
    write("a.jsonl", dump_lines(RECORDS) + "broken")
    reader = open_("a.jsonl")
    conversations = iter(reader)
    assert [next(conversations) for _ in range(2)] == CONVERSATIONS[:2]
    assert (reader.read, reader.position) == (2, 2)
    with pytest.raises(UsageError, match="line 4 is not valid JSON"):
        list(conversations)


def test_a_reader_counts_anew_each_time() -> None:
    reader = open_(numbers(5))
    assert list(reader) == list(reader)
    assert (reader.read, reader.dropped, reader.fingerprint) == (5, {"empty answer": 1}, read("n.jsonl").fingerprint)


@pytest.mark.parametrize("fields", [{}, {"sample": 6}, {"filter": {"query": {"differs": "q4"}}}, {"split": "[1:-1]"}])
@pytest.mark.parametrize("files", ["n.jsonl", "several"])
def test_a_reader_goes_on_where_another_stopped(fields: dict[str, Any], files: str) -> None:
    numbers(10)
    Path("several").mkdir()
    for part in range(3):
        write(f"several/{part}.jsonl", dump_lines([{"query": f"q{part * 4 + n}", "response": "a"} for n in range(4)]))
    whole = list(open_(files, **fields))
    reader = open_(files, **fields)
    before: list[Conversation] = []
    for conversation in reader:
        before.append(conversation)
        rest = list(open_(files, reader.position, **fields))
        assert before + rest == whole
    assert before == whole


def test_the_first_record_tells_the_format_wherever_reading_starts() -> None:
    write("a.jsonl", dump_lines([{"query": "q", "response": "a"}, {"query": "q", "response": "a", "messages": []}]))
    first, second = open_("a.jsonl")
    assert list(open_("a.jsonl", 1)) == [second] == [first]


def test_a_name_that_no_file_can_have_is_missing() -> None:
    assert "does not exist" in error_of("x" * 300) or "could not be read" in error_of("x" * 300)


def test_reading_takes_no_memory_for_what_was_read() -> None:
    write("a.jsonl", dump_lines([{"query": "q", "response": "x" * 1000}] * 5000))
    tracemalloc.start()
    assert sum(1 for _ in open_("a.jsonl")) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_a_source_is_explained() -> None:
    write("a.jsonl", dump_lines([{"query": "q", "respons": "a", "n": None}, {"query": 1}]))
    told = explain_source(SourceConfig(path="a.jsonl"))
    assert told.keys == {"query": {"text": 1, "number": 1}, "respons": {"text": 1}, "n": {"null": 1}}
    assert (told.records, told.format, told.close) == (2, "", {"query_response": ["response"]})
    assert "query_response lacks 'response' (there is 'respons')" in told.first
    mapped = explain_source(SourceConfig(path="a.jsonl", columns={"response": "respons"}))
    assert (mapped.format, mapped.unused) == ("query_response", ["n"])
    assert json.loads(json.dumps(mapped.to_dict()))["name"] == "a.jsonl"


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
