"""LLaMA-Factory's dataset_info.json is read as it is; its records become conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lory.config import build
from lory.data.sources.read import SourceConfig, SourceData, read_source
from lory.runtime import UsageError
from lory.types import Conversation, Message, ToolCall


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(entry: Any, records: list[Any], name: str = "lf/set.json") -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path("lf/dataset_info.json").write_text(json.dumps({"set": entry, "other": {"file_name": "other.json"}}))
    Path(name).write_text(json.dumps(records), encoding="utf-8")


def read(path: str = "lf/dataset_info.json", **fields: Any) -> SourceData:
    return read_source(build(SourceConfig, {"path": path, "dataset": "set", **fields}, "test"))


def error_of(**fields: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(**fields)
    return str(caught.value)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, **fields: Any) -> Message:
    return Message("assistant", text, **fields)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Conversation]] = {
    "alpaca without columns": (
        {},
        {"instruction": "Translate", "input": "hi", "output": "你好", "system": "not read", "extra": 1},
        Conversation((user("Translate\nhi"), assistant("你好"))),
    ),
    "alpaca with all columns": (
        {"columns": {"prompt": "q", "query": "more", "response": "a", "system": "sys", "history": "old"}},
        {"q": "2", "more": "", "a": "two", "sys": "Be brief.", "old": [["1", "one"]]},
        Conversation((Message("system", "Be brief."), user("1"), assistant("one"), user("2"), assistant("two"))),
    ),
    "columns that are not named are not there": (
        {"columns": {"prompt": "instruction", "response": "output"}},
        {"instruction": "a", "input": "not read", "output": "b"},
        Conversation((user("a"), assistant("b"))),
    ),
    "sharegpt without columns": (
        {"formatting": "sharegpt"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        Conversation((user("a"), assistant("b"))),
    ),
    "sharegpt with tags": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {
                "role_tag": "who",
                "content_tag": "what",
                "user_tag": "U",
                "assistant_tag": "A",
                "system_tag": "S",
            },
        },
        {"turns": [{"who": "S", "what": "s"}, {"who": "U", "what": "a"}, {"who": "A", "what": "b"}]},
        Conversation((Message("system", "s"), user("a"), assistant("b"))),
    ),
    "sharegpt with tools": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools", "system": "system"}},
        {
            "conversations": [
                {"from": "human", "value": "How warm?"},
                {"from": "function_call", "value": '{"name": "warmth", "arguments": {"place": "here"}}'},
                {"from": "observation", "value": "20"},
                {"from": "gpt", "value": "20 degrees."},
            ],
            "tools": '[{"name": "warmth", "description": "", "parameters": {}}]',
            "system": "",
        },
        Conversation(
            (
                user("How warm?"),
                assistant("", tool_calls=(ToolCall("warmth", '{"place": "here"}'),)),
                Message("tool", "20"),
                assistant("20 degrees."),
            )
        ),
    ),
    "ranking": (
        {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
        {"q": "a", "good": "b", "bad": "c"},
        Conversation((user("a"), assistant("b")), rejected=(assistant("c"),)),
    ),
    "ranking of sharegpt": (
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        Conversation((user("a"), assistant("b")), rejected=(assistant("c"),)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_records_become_conversations(case: str) -> None:
    entry, record, expected = CASES[case]
    write({"file_name": "set.json", **entry}, [record])
    source = read()
    (found,) = source.conversations
    assert found.messages == expected.messages
    assert found.rejected == expected.rejected
    assert bool(found.tools) == ("tools" in record)
    assert (source.name, source.notes) == ("set", [])
    assert read_source(SourceConfig.model_validate("lf/dataset_info.json:set")) == source
    assert read_source(SourceConfig.model_validate("lf:set#5")).conversations == [found]


def test_images_start_from_the_folder_of_the_file() -> None:
    Path("lf").mkdir()
    Path("lf/cat.png").write_bytes(b"")
    entry = {
        "file_name": "set.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
    write(entry, [{"messages": messages, "images": ["cat.png"]}])
    (conversation,) = read().conversations
    assert [media.kind for media in conversation.messages[0].media] == ["image"]
    assert str(conversation.messages[0].media[0].source).endswith("lf/cat.png")


def test_answers_to_avoid_are_dropped_and_counted() -> None:
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "good"}
    records = [{"instruction": "q", "output": f"a{n}", "good": n % 2 == 0} for n in range(5)]
    write({"file_name": "set.json", "columns": columns}, records)
    source = read()
    assert [conversation.messages[-1].content for conversation in source.conversations] == ["a0", "a2", "a4"]
    assert (source.read, source.dropped) == (5, {"its answer is to be avoided (good)": 2})


def test_the_number_of_samples_is_the_files_unless_the_source_says_another() -> None:
    write({"file_name": "set.json", "num_samples": 3}, [{"instruction": f"{n}", "output": "a"} for n in range(9)])
    assert len(read().conversations) == 3
    assert len(read(sample=5).conversations) == 5


def test_the_filter_sees_the_files_columns() -> None:
    write({"file_name": "set.json"}, [{"instruction": f"{n}", "output": "a", "lang": n % 2} for n in range(4)])
    source = read(filter={"lang": 1})
    assert [conversation.messages[0].content for conversation in source.conversations] == ["1", "3"]


def test_the_fingerprint_knows_how_records_are_read() -> None:
    write({"file_name": "set.json"}, [{"instruction": "a", "output": "b"}])
    first = read().fingerprint
    write({"file_name": "set.json", "columns": {"prompt": "instruction", "response": "output"}}, [])
    Path("lf/set.json").write_text('[{"instruction": "a", "output": "b"}]')
    assert read().fingerprint != first
    write({"file_name": "set.json", "num_samples": 1}, [{"instruction": "a", "output": "b"}])
    assert read().fingerprint != first


@pytest.mark.parametrize(
    ("entry", "record", "problem"),
    [
        ({}, {"instruction": "a"}, "is not what dataset_info.json describes: there is no 'output'"),
        ({"formatting": "sharegpt"}, {"conversations": "x"}, "'conversations' is no list"),
        (
            {"formatting": "sharegpt"},
            {"conversations": [{"from": "robot", "value": "x"}]},
            "'conversations[0].from' is the unknown role 'robot'; known are human, gpt, system",
        ),
        ({"formatting": "sharegpt"}, {"conversations": [{"role": "x"}]}, "'conversations[0]' has no 'from'"),
        (
            {"formatting": "sharegpt"},
            {"conversations": [{"from": "function_call", "value": "{"}]},
            "'conversations[0]' is a function call, but not JSON",
        ),
        ({"columns": {"prompt": "instruction", "kto_tag": "k"}}, {"k": "yes"}, "'k' is neither true nor false"),
        ({"ranking": True}, {"instruction": "a"}, "name none for 'chosen'"),
        ({"columns": {"prompt": "instruction", "response": "output"}}, {"instruction": 5, "output": ""}, "to be text"),
    ],
)
def test_a_record_that_is_not_as_described_is_refused_with_its_place(
    entry: dict[str, Any], record: dict[str, Any], problem: str
) -> None:
    write({"file_name": "set.json", **entry}, [record])
    message = error_of()
    assert message.startswith("lf/set.json record 1 is not what dataset_info.json describes: ")
    assert problem in message


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"file_name": "gone.json"}, "the file of 'set', lf/gone.json, does not exist"),
        ({"script_url": "x.py"}, "'set' comes from a 'script_url', which is not read"),
        ({}, "'set' has none of file_name, hf_hub_url and ms_hub_url"),
        ({"file_name": "set.json", "formatting": "chatml"}, "'set.formatting' was given 'chatml'"),
        ("set.json", "'set' was given 'set.json'"),
    ],
)
def test_a_wrong_entry_is_refused(entry: Any, problem: str) -> None:
    write(entry, [])
    assert problem in error_of()


def test_a_wrong_name_is_met_with_the_nearest() -> None:
    write({"file_name": "set.json"}, [])
    assert error_of(dataset="ste") == "lf/dataset_info.json has no data set 'ste'; did you mean 'set'?"
    assert (
        error_of(path="lf/set.json")
        == "lf/set.json is no dataset_info.json, nor a folder with one, as 'dataset' needs."
    )


def test_a_folder_that_describes_its_data_wants_a_name() -> None:
    write({"file_name": "set.json"}, [])
    assert error_of(path="lf", dataset=None) == (
        "lf/dataset_info.json describes data sets; name one with 'dataset': set, other."
    )


def test_a_file_of_that_name_with_another_purpose_is_passed_over() -> None:
    Path("saved").mkdir()
    Path("saved/dataset_info.json").write_text(json.dumps({"features": {"file_name": {"dtype": "string"}}}))
    Path("saved/a.jsonl").write_text('{"text": "x"}')
    assert read(path="saved", dataset=None).conversations == [Conversation(text="x")]
