"""The chat with a real model that sees: the same answers as from Python, over several turns and after loading."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.vision_models import make_qwen2_vl

from lory.assistant import Assistant, load
from lory.chat import terminal
from lory.chat.adapters import open_chat
from lory.chat.questions import answer_file
from lory.generate import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-VL."""
    path = tmp_path_factory.mktemp("tiny-qwen2-vl")
    make_qwen2_vl(path)
    return path


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return load(folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.linear_gradient("L").resize((40, 16)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_mark_a_turn_later_and_after_loading(
    assistant: Assistant, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(*lines: object) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert terminal.run_chat(assistant, options=OPTIONS, as_json=True) == 0
        return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]

    saved = photo.with_name("talk.json")
    first, second = chat("What is <image>?", photo, "And why?", f":save {saved}")
    parts = [
        {"type": "text", "text": "What is "},
        {"type": "image", "image": str(photo)},
        {"type": "text", "text": "?"},
    ]
    messages: list[dict[str, object]] = [{"role": "user", "content": parts}]
    assert first == assistant.chat(messages, OPTIONS)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And why?"}]
    assert second == assistant.chat(messages, OPTIONS)
    messages += [{"role": "assistant", "content": second}, {"role": "user", "content": "Go on."}]
    assert chat(f":load {saved}", "Go on.") == [assistant.chat(messages, OPTIONS)]


def test_questions_about_images_are_answered_from_a_file(assistant: Assistant, photo: Path) -> None:
    asked, output = photo.with_name("questions.jsonl"), photo.with_name("answers.jsonl")
    records = [{"messages": [{"role": "user", "content": "<image>What?"}], "images": ["photo.png"]}, "Hi"]
    asked.write_text("\n".join(map(json.dumps, records)))
    assert answer_file(assistant, asked, output, {}, options=OPTIONS).failed == 0
    found = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    assert found[0][0]["content"][0] == {"type": "image", "image": str(photo)}
    for messages in found:
        assert messages[-1]["content"] == assistant.chat(messages[:-1], OPTIONS)


def test_the_reader_stays_when_adapters_change(folder: Path) -> None:
    assistant, adapters = open_chat(folder)
    assert adapters is not None
    assert assistant.sees_images
    assert adapters.use(None).sees_images
