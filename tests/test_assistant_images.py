"""`lory.load(MODEL)` with images: prompts and answers are those of transformers' own processor and generate."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.vision_models import SERVED, draw

from lory.architectures import find_model_class
from lory.assistant import Assistant, load
from lory.generate import GenerationOptions, generate_batch, stream_ids
from lory.models.load import load_processor, load_tokenizer
from lory.models.resolve import resolve
from lory.runtime import UsageError
from lory.types import Media, Message

TWELVE = GenerationOptions(max_new_tokens=12)


def ask(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    """A question of texts and images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": role, "content": content}]


QUESTION = ask(draw(1), "Which is larger, this or", draw(2, 16, 16), "?")


@pytest.fixture(scope="module")
def qwen(vision_model: Callable[[str], Path]) -> Assistant:
    return load(vision_model("qwen2_vl"), device="cpu")


@pytest.mark.parametrize("family", SERVED)
def test_prompts_and_greedy_answers_are_those_of_transformers(family: str, vision_model: Callable[[str], Path]) -> None:
    folder = vision_model(family)
    resolved = resolve(folder)
    processor: Any = load_processor(resolved, load_tokenizer(resolved))
    theirs = processor.apply_chat_template(
        QUESTION, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ours = (assistant := load(folder, device="cpu")).prompt(QUESTION)
    assert ours.ids == theirs["input_ids"][0].tolist()
    assert ours.inputs.keys() == theirs.keys() - {"input_ids", "attention_mask"}
    for name, value in ours.inputs.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)

    model = find_model_class(assistant.model.config).from_pretrained(folder).eval()
    expected = model.generate(**theirs, max_new_tokens=12, do_sample=False)[0, len(ours) :].tolist()
    assert assistant.answer_ids(QUESTION, TWELVE) == expected[: expected.index(2) if 2 in expected else None]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_texts_and_images_are_answered_in_one_batch(family: str, vision_model: Callable[[str], Path]) -> None:
    assistant = load(vision_model(family), device="cpu")
    questions = [QUESTION, "Hello", ask(draw(3), draw(4), "And these two?")]
    prompts = [assistant.prompt(question) for question in questions]
    together = generate_batch(assistant.model, prompts, TWELVE, assistant.terminators)
    assert together == [assistant.answer_ids(question, TWELVE) for question in questions]


def test_answers_that_are_streamed_side_by_side_do_not_mix_their_positions(qwen: Assistant) -> None:
    questions = [QUESTION, ask(draw(5, 40, 8), "What is it?")]
    streams = [stream_ids(qwen.model, qwen.prompt(question), TWELVE, qwen.terminators) for question in questions]
    answers: list[list[int]] = [[], []]
    for _ in range(12):
        for answer, stream in zip(answers, streams, strict=True):
            answer += [token for token in [next(stream, None)] if token is not None]
    assert answers == [qwen.answer_ids(question, TWELVE) for question in questions]


def test_an_image_may_come_as_anything_that_names_it(qwen: Assistant, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    draw(1).save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = qwen.prompt(ask(draw(1), "Hi")).inputs["pixel_values"]
    parts = [{"type": "image", "image": image} for image in (path, str(path), data, url)]
    parts.append({"type": "image_url", "image_url": {"url": url}})
    for part in parts:
        found = qwen.prompt([{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}])
        torch.testing.assert_close(found.inputs["pixel_values"], expected)
    messages = [Message("user", "<image>Hi", (Media("image", data),))]
    torch.testing.assert_close(qwen.prompt(messages).inputs["pixel_values"], expected)


def test_an_image_in_an_earlier_message_stays_seen(qwen: Assistant) -> None:
    chat = [*QUESTION, {"role": "assistant", "content": "This."}, {"role": "user", "content": "Are you sure?"}]
    assert len(qwen.prompt(chat).inputs["image_grid_thw"]) == 2
    assert qwen.prompt(chat).ids[: len(qwen.prompt(QUESTION))] == qwen.prompt(QUESTION).ids


def test_a_text_model_says_that_it_sees_nothing(tiny_model: Path) -> None:
    assistant = load(tiny_model, device="cpu")
    assert not assistant.sees_images
    with pytest.raises(UsageError, match="reads text only"):
        assistant.chat(QUESTION)


@pytest.mark.parametrize(
    ("content", "media", "said"),
    [
        ("Two <image> marks <image>", 1, "2 <image> marks and 1 image;"),
        ("No mark", 1, "0 <image> marks and 1 image;"),
        ("One <image> mark", 0, "1 <image> mark and 0 images;"),
        ("The model's own <|image_pad|> mark", 0, "1 marks for images"),
    ],
)
def test_marks_and_images_have_to_agree(qwen: Assistant, content: str, media: int, said: str) -> None:
    file = io.BytesIO()
    draw(1).save(file, "PNG")
    with pytest.raises(UsageError, match=said.replace("|", r"\|")):
        qwen.prompt([Message("user", content, (Media("image", file.getvalue()),) * media)])


def test_nothing_is_fetched_and_nothing_opened_outside_unless_asked(qwen: Assistant, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing is fetched"):
        qwen.prompt([{"role": "user", "content": [{"type": "image", "image": "http://127.0.0.1/a.png"}]}])
    draw(1).save(tmp_path / "a.png")
    qwen.image_root = None
    try:
        with pytest.raises(UsageError, match="files are not opened here"):
            qwen.prompt(ask(tmp_path / "a.png", "Hi"))
    finally:
        qwen.image_root = Path("/")


def test_an_image_that_the_processor_refuses_is_one_sentence(qwen: Assistant) -> None:
    with pytest.raises(UsageError, match=r"refuses an image \(1000 x 2 pixels\): .*aspect ratio"):
        qwen.prompt(ask(Image.new("RGB", (1000, 2)), "Hi"))


def test_a_model_that_sees_without_its_processor_is_refused(
    vision_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for file in vision_model("qwen2_vl").iterdir():
        if "processor" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UsageError, match=r"has no processor_config.json or preprocessor_config.json"):
        load(tmp_path, device="cpu")
