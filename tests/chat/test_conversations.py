"""Conversations in files: what is saved can be loaded, trained on and sent to an API; what cannot be read is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from lory.chat.conversations import read_talks, save_conversation, to_turns
from lory.chat.pictures import Picture
from lory.data.sources.config import SourceConfig
from lory.data.sources.read import read_source
from lory.runtime import UsageError
from lory.types import Message

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [{"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello\n\u2028there"}]


def picture() -> Picture:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return Picture("red.png", file.getvalue())


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_what_is_saved_is_read_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_conversation([SYSTEM, *TALK], path)
    (talk,) = read_talks(path)
    assert talk.answer is not None
    assert [message.to_dict() for message in (*talk.messages, talk.answer)] == [SYSTEM, *TALK]
    assert len(read_source(SourceConfig(path=str(path))).conversations) == 1


def test_images_are_saved_as_openai_has_them_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    turns = [{"role": "user", "content": "Is <image> red?", "images": (picture(),)}, TALK[1]]
    save_conversation(turns, path)
    parts = json.loads(path.read_text())["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,")
    (talk,) = read_talks(path)
    (turn,) = to_turns(talk.messages, tmp_path)
    assert turn["content"] == "Is <image> red?"
    assert turn["images"][0].data == picture().data
    assert len(read_source(SourceConfig(path=str(path))).conversations) == 1


def test_lines_are_added_to_jsonl_even_after_one_that_was_left_open(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": TALK}))
    for _ in range(2):
        save_conversation(TALK, path)
    assert len(read_talks(path)) == 3


def test_json_is_replaced_and_other_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save_conversation([*TALK, *TALK], path)
    save_conversation(TALK, path)
    assert len(read_talks(path)[0].messages) == 1
    with pytest.raises(UsageError, match=r"called \.json or \.jsonl"):
        save_conversation(TALK, tmp_path / "talk.txt")


def test_questions_come_in_many_forms(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [
        "Hi",
        {"prompt": "Hi"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        [{"role": "user", "content": "Hi"}],
    ]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [talk.messages for talk in read_talks(path)] == [(Message("user", "Hi"),)] * 4
    assert [talk.where for talk in read_talks(path)][:2] == [f"{path}, line 1", f"{path}, line 3"]
    (tmp_path / "all.json").write_text(json.dumps(lines))
    assert len(read_talks(tmp_path / "all.json")) == 4
    (tmp_path / "one.json").write_text(json.dumps(lines[3]))
    assert len(read_talks(tmp_path / "one.json")) == 1
    (tmp_path / "plain.txt").write_text("  Hi \r\n\n{\u2028}\n")
    assert [talk.messages[0].content for talk in read_talks(tmp_path / "plain.txt")] == ["Hi", "{\u2028}"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.json", "  ", "is empty|is expected"),
        ("a.txt", "\n\n", "is empty"),
        ("a.csv", "Hi", r"is called \.json, \.jsonl, \.txt"),
        ("a.jsonl", '"Hi"\n{', "line 2 is not valid JSON"),
        ("a.json", "{", "is not valid JSON"),
        ("a.jsonl", "7", "line 1: a question, or messages as in"),
        ("a.jsonl", '{"messages": []}', "line 1: a question, or messages as in"),
        ("a.jsonl", '[{"role": "user"}]', r"line 1: 'messages\[0\]"),
        ("a.jsonl", '[{"role": "king", "content": "Hi"}]', "unknown role 'king'"),
        ("a.jsonl", '[{"role": "assistant", "content": "Hi"}]', "turn 1 is from 'assistant' where 'user' is expected"),
        ("a.jsonl", '[{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}]', "turn 2 is from 'user'"),
        (
            "a.jsonl",
            '[{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": '
            '[{"function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "1"}]',
            "calls tools",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=problem) as caught:
        read_talks(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="could not be read: No such file"):
        read_talks(tmp_path / "missing.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_talks(tmp_path / "bytes.txt")


def test_sounds_cannot_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "<audio>?"}], "audios": ["a.wav"]}))
    (talk,) = read_talks(path)
    with pytest.raises(UsageError, match="has audios in it"):
        to_turns(talk.messages, tmp_path)
