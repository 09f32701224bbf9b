"""Images, sounds and videos are found in columns and in parts, take the place of their marks, and are counted."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from lory.data.records.fields import ReadOptions
from lory.data.records.formats import convert, explain
from lory.runtime import UsageError
from lory.types import Conversation, Media, Message

WHERE = "a.jsonl line 7"
PNG = b"\x89PNG"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
OPTIONS = ReadOptions(media_root="data")


def expected(*sources: str | bytes, content: str = "<image>What is it?") -> Conversation:
    media = tuple(Media("image", source) for source in sources)
    return Conversation((Message("user", content, media=media), Message("assistant", "A cat.")))


def openai(content: Any, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    return {"messages": messages, **columns}


MARKED = "<image>What is it?"
TEXT = {"type": "text", "text": "What is it?"}
LLAVA = [{"from": "human", "value": MARKED}, {"from": "gpt", "value": "A cat."}]

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("alpaca", {"instruction": MARKED, "output": "A cat.", "images": ["a.png"]}),
    ("alpaca", {"instruction": "<image>", "input": "What is it?", "output": "A cat.", "image": "a.png"}),
    ("sharegpt", {"conversations": LLAVA, "image": "a.png"}),
    ("sharegpt", {"conversations": LLAVA, "images": ["a.png"]}),
    ("messages", openai(MARKED, images=["a.png"])),
    ("messages", openai(MARKED, images=[{"bytes": None, "path": "a.png"}])),
    ("messages", openai(MARKED, images="./a.png", videos=[], audios=None)),
    ("messages", openai([{"type": "image"}, TEXT], images=["a.png"])),
    ("messages", openai([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT])),
    ("messages", openai([{"type": "image_url", "image_url": "a.png", "text": None}, TEXT | {"image_url": None}])),
    ("messages", openai([{"type": "image", "image": "b/../a.png"}, TEXT])),
    ("messages", openai([{"type": "image", "path": "a.png"}, TEXT])),
    ("messages", openai([{"type": "image", "image": {"path": "a.png"}}, TEXT])),
    ("messages", openai([{"type": "input_image", "image_url": "a.png"}, TEXT])),
    ("query_response", {"query": MARKED, "response": "A cat.", "images": ["a.png"]}),
    ("prompt_completion", {"prompt": MARKED, "completion": "A cat.", "image": "a.png"}),
    ("xtuner", {"conversation": [{"input": MARKED, "output": "A cat."}], "images": ["a.png"]}),
]


@pytest.mark.parametrize(("format", "record"), FORMS)
def test_an_image_is_equal_in_every_form(format: str, record: dict[str, Any]) -> None:
    # the line break is what Alpaca has between instruction and input
    content = "<image>\nWhat is it?" if "input" in record else MARKED
    assert convert(record, format, WHERE, options=OPTIONS) == expected("data/a.png", content=content)


VALUES: list[tuple[Any, str | bytes]] = [
    ("a.png", "data/a.png"),
    ("x/./y/../a b.png", "data/x/a b.png"),
    (PNG, PNG),
    ({"bytes": PNG, "path": "a.png"}, PNG),
    ({"url": "https://example.org/a.png"}, "https://example.org/a.png"),
    ("https://example.org/a.png?x=1", "https://example.org/a.png?x=1"),
    (DATA_URL, DATA_URL),
    ("data:;base64,iVBO", "data:;base64,iVBO"),
    ("data:image/svg+xml;charset=utf-8;base64,iVBO", "data:image/svg+xml;charset=utf-8;base64,iVBO"),
]


@pytest.mark.parametrize(("value", "source"), VALUES)
def test_a_value_is_a_path_a_url_or_bytes(value: Any, source: str | bytes) -> None:
    assert convert(openai(MARKED, images=[value]), "messages", WHERE, options=OPTIONS) == expected(source)
    part = {"type": "image", "image": value}
    assert convert(openai([part, TEXT]), "messages", WHERE, options=OPTIONS) == expected(source)


def test_paths_may_be_absolute_inside_of_the_root(tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    record = openai(MARKED, images=[path])
    assert convert(record, "messages", WHERE, options=ReadOptions(str(tmp_path))) == expected(path)
    assert convert(record, "messages", WHERE, options=ReadOptions("/")) == expected(path)


def test_without_a_root_paths_start_at_the_working_directory() -> None:
    assert convert(openai(MARKED, images=["x/a.png"]), "messages", WHERE) == expected("x/a.png")


def test_media_go_to_their_marks_in_order_through_all_messages() -> None:
    turns = [
        {"from": "human", "value": "<image> and <audio>, then <image>"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "<video>?"},
        {"from": "gpt", "value": "no"},
    ]
    record = {"conversations": turns, "images": ["1.png", "2.png"], "audios": ["a.wav"], "videos": ["v.mp4"]}
    messages = convert(record, "sharegpt", WHERE).messages
    assert messages[0].media == (Media("image", "1.png"), Media("audio", "a.wav"), Media("image", "2.png"))
    assert messages[2].media == (Media("video", "v.mp4"),)
    assert messages[0].parts()[2] == {"type": "audio", "audio": "a.wav"}
    assert messages[1].media == messages[3].media == ()


def test_openais_sound_is_a_data_url() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}
    message = convert(openai([sound, TEXT]), "messages", WHERE).messages[0]
    assert message == Message("user", "<audio>What is it?", media=(Media("audio", "data:audio/wav;base64,UklG"),))


@pytest.mark.parametrize("record", [openai("Close the <image> tag, <audio>"), openai([TEXT | {"text": "<image>"}])])
def test_a_mark_is_plain_text_in_a_record_without_media(record: dict[str, Any]) -> None:
    message = convert(record, "messages", WHERE).messages[0]
    assert "<image>" in message.content
    assert message.media == ()
    assert message.to_dict()["content"] == message.content


def test_a_record_without_marks_is_an_error_unless_media_stand_first() -> None:
    record = {"query": "c", "response": "d", "history": [["a", "b"]], "images": ["1.png", "2.png"], "video": "v.mp4"}
    messages = convert(record, "query_response", WHERE, options=ReadOptions(media_first=True)).messages
    assert messages[0].content == "<image><image><video>a"
    assert [media.source for media in messages[0].media] == ["1.png", "2.png", "v.mp4"]
    with pytest.raises(UsageError, match="0 <image> marks, but 'images' has 2"):
        convert(record, "query_response", WHERE)


@pytest.mark.parametrize(
    ("question", "content"),
    [("", "<image>"), ("Read it.", "<image>Read it."), ("Read\n<image>\nnow.", "Read\n<image>\nnow.")],
)
def test_image_and_text_become_a_question_and_an_answer(question: str, content: str) -> None:
    record = {"image": {"bytes": PNG, "path": None}, "text": "A cat."}
    conversation = convert(record, "image_text", WHERE, options=ReadOptions(question=question))
    assert conversation == expected(PNG, content=content)


MALFORMED: list[tuple[dict[str, Any], str]] = [
    (openai(MARKED, images=["1.png", "2.png"]), "the text has 1 <image> mark, but 'images' has 2"),
    (openai("<image><image>", image="1.png"), "the text has 2 <image> marks, but 'image' has 1"),
    (openai(MARKED, images=[]), "the text has 1 <image> mark, but 'images' has 0"),
    (openai(MARKED, images=None), "the text has 1 <image> mark, but 'images' has 0"),
    (openai("<image><audio>", images=["1.png"]), "the text has 1 <audio> mark, but the record has 0"),
    (openai(MARKED, images=["1.png"], image="1.png"), "there are both 'images' and 'image'"),
    (openai(MARKED, images=[3]), "'images[0]' is the number 3, but a path, a URL or a file's bytes"),
    (
        openai(MARKED, image=object()),
        "'image' is a object, but a path, a URL or a file's bytes are expected (in a data",
    ),
    (openai(MARKED, images=[" "]), "'images[0]' is empty, but a path or a URL is expected"),
    (openai(MARKED, images=[b""]), "'images[0]' is empty, but the bytes of a file"),
    (
        openai(MARKED, images=[{"bytes": None}]),
        "'images[0]' has none of 'bytes', 'path' and 'url'; its keys are 'bytes'",
    ),
    (openai(MARKED, images=[{"path": ""}]), "'images[0].path' is empty"),
    (openai(MARKED, images=["a\x00.png"]), "'images[0]' holds a NUL character"),
    (openai(MARKED, images=["../a.png"]), "'images[0]' is the path '../a.png', which leads out of the folder"),
    (openai(MARKED, images=["x/../../a.png"]), "which leads out of the folder"),
    (openai(MARKED, images=["/etc/passwd"]), "which leads out of the folder"),
    (openai(MARKED, images=["."]), "which leads out of the folder"),
    (openai(MARKED, images=["file:///etc/passwd"]), "'images[0]' is the URL 'file:///etc/passwd', but http(s)"),
    (openai(MARKED, images=["FILE:/etc/passwd"]), "is the URL 'FILE:/etc/passwd'"),
    (openai(MARKED, images=["s3://bucket/a.png"]), "is the URL 's3://bucket/a.png'"),
    (openai(MARKED, images=["https:///a.png"]), "is the URL 'https:///a.png'"),
    (openai(MARKED, images=["http://[a.png"]), "is the URL 'http://[a.png'"),
    (openai(MARKED, images=["data:image/png,abc"]), "a data URL is data:image/...;base64,..."),
    (openai(MARKED, images=["data:image/png;base64,abc"]), "is a data URL whose base64 is broken"),
    (openai(MARKED, images=["data:image/png;base64,@@@@"]), "is a data URL whose base64 is broken"),
    (openai(MARKED, images=["data:image/png;base64,äöü="]), "is a data URL whose base64 is broken"),
    (openai(MARKED, images=["data:image/png;base64,"]), "is a data URL without content"),
    (openai(MARKED, images=["data:audio/wav;base64,UklG"]), "a data URL of type 'audio', but 'image' is expected"),
    (openai(MARKED, images=["iVBORw0K" * 1000]), "is text of 8000 characters, too long for a path; base64 is written"),
    (openai([{"type": "image"}, TEXT]), "'messages[0].content[0]' has no 'image' in it, nor does the record have"),
    (
        openai([{"type": "smell"}]),
        "'messages[0].content[0].type' is the unknown type 'smell'; known are 'text', 'image",
    ),
    (openai([{"text": "a"}]), "'messages[0].content[0]' has no 'type'"),
    (openai(["a"]), "'messages[0].content[0]' is text, but an object"),
    (openai([{"type": "text", "text": None}]), "'messages[0].content[0].text' is null"),
    (openai([{"type": "image_url", "image_url": {"url": ""}}]), "'messages[0].content[0].image_url.url' is empty"),
    (openai([{"type": "input_audio", "input_audio": {}}]), "'messages[0].content[0].input_audio' has no 'data'"),
    (
        openai([{"type": "image", "base64": "@"}]),
        "'messages[0].content[0].base64' is a data URL whose base64 is broken",
    ),
    (
        openai([{"type": "image", "path": "a.png"}, {"type": "image"}], images=["b.png"]),
        "both with and without a value",
    ),
    (openai([{"type": "image", "path": "a.png"}, {"type": "text", "text": "<image>"}]), "has a mark such as <image>"),
]


@pytest.mark.parametrize(("record", "problem"), MALFORMED)
def test_malformed_media_are_an_error_that_names_the_key(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        convert(record, "messages", WHERE, options=OPTIONS)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert problem in str(caught.value)


def test_media_are_explained() -> None:
    record = openai("<image><image>?", images=[PNG, "a.png"])
    assert 'user: "<image><image>?" (15 characters), image of 4 bytes, image a.png' in explain(record)
