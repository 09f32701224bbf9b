"""Conversations with images as samples: the tokens that are served, images never cut, learnt or lost unsaid."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tests.vision_models import draw

from lory.assistant import Assistant, load
from lory.data.encoding.encode import Encoder
from lory.data.encoding.pictures import ImageRules, digest_pixels, reopen
from lory.data.mixture.dataset import DataConfig, Dataset, build_dataset
from lory.data.vision.images import ImageLimits
from lory.data.vision.reader import ImageReader, Resizing
from lory.runtime import LoryError, UsageError
from lory.types import IGNORE, Conversation, Media, Message, Sample, SampleImage


@pytest.fixture(scope="module")
def qwen(vision_model: Callable[[str], Path]) -> Assistant:
    return load(vision_model("qwen2_vl"), device="cpu")


def encoder_of(assistant: Assistant, folder: Path, max_tokens: int = 500, **rules: Any) -> Encoder:
    return Encoder(
        assistant.tokenizer,
        assistant.terminators,
        max_tokens,
        reader=assistant.reader,
        rules=ImageRules((folder,)),
        **rules,
    )


def picture(folder: Path, number: int, height: int = 20, width: int = 30) -> Media:
    path = folder / f"{number}-{height}x{width}.png"
    draw(number, height, width).save(path)
    return Media("image", str(path))


def write_records(folder: Path, images: list[str], **more: Any) -> Path:
    """A JSONL file with a record for each image."""
    lines = [
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": f"No. {n}"}]}
        | {"images": [image]}
        for n, image in enumerate(images)
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line | more) + "\n" for line in lines))
    return path


def build(assistant: Assistant, source: dict[str, Any], **data: Any) -> Dataset:
    config = DataConfig.model_validate({"train": [source], "max_tokens": 300, **data})
    return build_dataset(config, assistant.tokenizer, assistant.terminators, 0, assistant.reader)


def test_the_tokens_that_are_learnt_are_those_that_are_served(qwen: Assistant, tmp_path: Path) -> None:
    question = Message("user", "<image>And <image>?", (picture(tmp_path, 1), picture(tmp_path, 2, 16, 16)))
    again = Message("user", "<image>?", (picture(tmp_path, 3),))
    chat = (question, Message("assistant", "Two."), again, Message("assistant", "One more."))
    (sample,) = encoder_of(qwen, tmp_path).encode(Conversation(chat)).samples
    ids = list(sample.input_ids)
    for end in (1, 3):
        prompt = qwen.prompt(chat[:end])
        assert ids[: len(prompt)] == prompt.ids
        assert sample.labels[len(prompt)] == ids[len(prompt)] != IGNORE
        assert set(sample.labels[len(prompt) - 3 : len(prompt)]) == {IGNORE}
    assert [reopen(image).size for image in sample.images] == [(30, 20), (16, 16), (30, 20)]


def test_the_tokens_of_images_are_never_learnt(qwen: Assistant, tmp_path: Path) -> None:
    answer = Message("assistant", "Here: <image>", (picture(tmp_path, 2),))
    chat = (Message("user", "<image>?", (picture(tmp_path, 1),)), answer)
    (sample,) = encoder_of(qwen, tmp_path, loss_on="all").encode(Conversation(chat)).samples
    assert qwen.reader is not None
    token = qwen.reader.token_id
    assert sample.input_ids.count(token) == 16
    assert token not in sample.labels
    assert len(sample.images) == 2


def test_a_sample_that_is_too_long_is_dropped_or_its_images_shrink(qwen: Assistant, tmp_path: Path) -> None:
    chat = (Message("user", "<image>?", (picture(tmp_path, 1, 32, 32),)), Message("assistant", "Yes."))
    whole = encoder_of(qwen, tmp_path).encode(Conversation(chat)).samples[0]
    dropped = encoder_of(qwen, tmp_path, len(whole) - 1).encode(Conversation(chat))
    assert dropped.samples == ()
    assert dropped.dropped == f"longer than {len(whole) - 1} tokens, images included, which are not cut"
    cut = encoder_of(qwen, tmp_path, len(whole) - 1, on_long="cut_prompt").encode(Conversation(chat))
    assert cut.dropped == dropped.dropped

    encoder = encoder_of(qwen, tmp_path, len(whole) - 5, on_long="shrink_images")
    (shrunk,) = encoder.encode(Conversation(chat)).samples
    assert len(shrunk) <= len(whole) - 5
    assert [token for token in shrunk.labels if token != IGNORE] == [t for t in whole.labels if t != IGNORE]
    height, width = shrunk.images[0].size or (0, 0)
    assert height * width < 32 * 32
    assert reopen(shrunk.images[0]).size == (width, height)
    assert encoder.notes == {"conversations whose images were shrunk": 1}
    # however small an image is made, some tokens stand for it
    assert encoder_of(qwen, tmp_path, 20, on_long="shrink_images").encode(Conversation(chat)).samples == ()


def test_sizes_are_bounded_as_the_config_or_the_environment_says(
    qwen: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(write_records(tmp_path, [picture(tmp_path, 1, 32, 32).source]))}
    assert int(build(qwen, source).train.lengths[0]) - 16 == (small := length_with(qwen, source, Resizing(256)) - 4)
    assert small > 0
    monkeypatch.setenv("MAX_PIXELS", "256")
    assert DataConfig.model_validate({"train": [source]}).max_pixels == 256
    monkeypatch.setenv("MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="MAX_PIXELS is 'many'"):
        DataConfig.model_validate({"train": [source]})


def length_with(assistant: Assistant, source: dict[str, Any], resizing: Resizing) -> int:
    """Tokens of the first sample when images are resized so."""
    fresh = load(assistant.model.name_or_path, device="cpu")
    assert fresh.reader is not None
    fresh.reader = ImageReader(fresh.reader.processor, resizing)
    return int(build(fresh, source).train.lengths[0])


def test_images_inside_of_parquet_are_kept_with_the_samples(qwen: Assistant, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        file = io.BytesIO()
        draw(number).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{number}.png"}, "text": f"x_{number}"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    source = {"path": str(tmp_path / "data.parquet"), "question": "Formula?"}
    dataset = build(qwen, source)
    (tmp_path / "data.parquet").unlink()
    for number, sample in enumerate(dataset.train[:]):
        assert reopen(sample.images[0]).tobytes() == draw(number).tobytes()
    assert dataset.report()["sources"][0]["images"] == 3


def test_a_copy_larger_than_the_file_it_was_made_of_is_opened_again() -> None:
    image, file = Image.new("RGB", (4100, 4100)), io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    copy = file.getvalue()
    assert len(copy) > ImageLimits().max_bytes
    assert reopen(SampleImage(copy, digest_pixels(image))).size == image.size


def test_an_image_that_has_changed_is_encoded_again(qwen: Assistant, tmp_path: Path) -> None:
    image = picture(tmp_path, 1)
    source = {"path": str(write_records(tmp_path, [str(image.source)]))}
    before: Sample = build(qwen, source).train[0]
    assert build(qwen, source).train.stores[0].folder == build(qwen, source).train.stores[0].folder
    draw(2, 40, 16).save(image.source)
    after: Sample = build(qwen, source).train[0]
    assert before.images[0].digest != after.images[0].digest
    assert len(before) != len(after)
    with pytest.raises(LoryError, match="has changed since"):
        reopen(before.images[0])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "has zero bytes"),
    "truncated": (lambda path: path.write_bytes(png(draw(1, 200, 200))[:9000]), "is truncated or damaged"),
    "no image": (lambda path: path.write_bytes(b"not an image at all"), "is none of the known formats"),
    "too large": (lambda path: Image.new("1", (20_000, 20_000)).save(path), "pixels than the limit"),
    "too narrow": (lambda path: Image.new("RGB", (900, 3)).save(path), "refuses an image"),
}
GOOD: dict[str, Callable[[Path], Any]] = {
    "1x1": lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"),
    "animated": lambda path: draw(1).save(path, "GIF", save_all=True, append_images=[draw(2)]),
    "cmyk": lambda path: draw(1).convert("CMYK").save(path, "JPEG"),
    "16 bits": lambda path: Image.new("I;16", (20, 20), 40_000).save(path, "PNG"),
    "alpha": lambda path: draw(1).convert("RGBA").save(path, "PNG"),
    "rotated": lambda path: draw(1).save(
        path,
        "JPEG",
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00"
        b"\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00",
    ),
}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_bad_image_stops_the_reading_with_one_line(qwen: Assistant, tmp_path: Path) -> None:
    for name, (make, said) in BAD.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "bad.png")
        source = {"path": str(write_records(folder, ["bad.png"]))}
        with pytest.raises(UsageError) as error:
            build(qwen, source)
        message = str(error.value)
        assert said in message
        assert "data.jsonl" in message
        assert "\n" not in message


def test_bad_images_are_left_out_where_that_is_wanted_and_each_is_told(
    qwen: Assistant, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, (make, _) in BAD.items():
        make(tmp_path / f"{name}.png")
    for name, make_good in GOOD.items():
        make_good(tmp_path / f"{name}.png")
    names = [f"{name}.png" for name in (*BAD, *GOOD)]
    source = {"path": str(write_records(tmp_path, names)), "on_bad": "drop"}
    with caplog.at_level(logging.WARNING):
        report = build(qwen, source).report()["sources"][0]
    assert report["kept"] == len(GOOD)
    assert sum(report["dropped"].values()) == len(BAD)
    assert report["dropped"]["malformed: an image that does not exist"] == 1
    assert sum("left out" in line.getMessage() for line in caplog.records) == len(BAD)
    assert sum(note.startswith("left out") for note in report["notes"]) == len(BAD)

    # once it is mended, it is found, though all the rest is in the cache
    draw(1).save(tmp_path / "missing.png")
    assert build(qwen, source).report()["sources"][0]["kept"] == len(GOOD) + 1


def test_a_mark_without_an_image_is_a_bad_record(qwen: Assistant, tmp_path: Path) -> None:
    for text, said in (("An <image> mark", "1 <image> mark and 0 images"), ("<|image_pad|>", "1 marks for images")):
        chat = Conversation((Message("user", text), Message("assistant", "Yes.")))
        with pytest.raises(UsageError, match=said):
            encoder_of(qwen, tmp_path).encode(chat)
        lenient = encoder_of(qwen, tmp_path).with_rules(ImageRules((tmp_path,), "drop"))
        assert lenient.encode(chat).dropped.startswith("malformed: ")


def test_an_image_outside_of_the_folder_is_refused(qwen: Assistant, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    draw(1).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "inside" / "link.png")
    for name in ("../secret.png", "link.png"):
        with pytest.raises(UsageError, match="leads out of the folder"):
            build(qwen, {"path": str(write_records(tmp_path / "inside", [name]))})


def test_an_image_on_the_web_is_fetched_only_when_asked(qwen: Assistant, tmp_path: Path) -> None:
    source = {"path": str(write_records(tmp_path, ["http://127.0.0.1:1/a.png"]))}
    with pytest.raises(UsageError, match="nothing is fetched here"):
        build(qwen, source)
    with pytest.raises(UsageError, match="not on the public net"):
        build(qwen, source, fetch_images=True)


def test_a_text_model_refuses_records_with_images(tiny_model: Path, tmp_path: Path) -> None:
    picture(tmp_path, 1)
    source = {"path": str(write_records(tmp_path, ["1-20x30.png"]))}
    with pytest.raises(UsageError, match="a message has images, but this model reads text only"):
        build(load(tiny_model, device="cpu"), source)


def test_more_processes_give_the_same_samples(qwen: Assistant, tmp_path: Path) -> None:
    names = [Path(str(picture(tmp_path, number).source)).name for number in range(6)]
    source = {"path": str(write_records(tmp_path, names))}
    alone, together = (build(qwen, source, cache=False, workers=workers).train[:] for workers in (1, 2))
    assert alone == together
