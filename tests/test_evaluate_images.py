"""`lory eval` of models that see: images beside targets and answers, and formulas compared as formulas."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageDraw
from tests.vision_models import make_qwen2_vl

from lory.assistant import Assistant, load
from lory.data.encoding.encode import Encoder
from lory.data.encoding.pictures import ImageRules
from lory.data.sources.config import SourceConfig
from lory.evaluate.answers import Prediction
from lory.evaluate.formulas import are_formulas, score_formulas, split_formula
from lory.evaluate.page import draw_page
from lory.evaluate.records import read_sources
from lory.evaluate.run import Evaluation, Settings, evaluate
from lory.evaluate.thumbnails import Thumbnails
from lory.generate import GenerationOptions
from lory.runtime import UsageError
from lory.types import IGNORE, Media

TEXTS = ["x = 2", r"\frac { a } { b }", "Paris"]


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """A tiny random Qwen2-VL."""
    folder = tmp_path_factory.mktemp("tiny-qwen2-vl")
    make_qwen2_vl(folder)
    return load(folder)


def draw(text: str, size: tuple[int, int] = (40, 16)) -> bytes:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((2, 2), text, fill="black")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Images with their texts, as LaTeX_OCR has them."""
    rows = [{"image": {"bytes": draw(text), "path": None}, "text": text} for text in TEXTS]
    path = tmp_path / "set" / "test.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images with a csv."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number, text in enumerate(TEXTS):
        (place / f"{number}.png").write_bytes(draw(text))
    lines = [f'{number}.png,"{text}"' for number, text in enumerate(TEXTS)]
    (place / "labels.csv").write_text("image,text\n" + "\n".join(lines) + "\n")
    return place / "labels.csv"


def source(path: Path, **values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), "question": "What is written there?", **values})


SETTINGS = Settings(generate=True, options=GenerationOptions(max_new_tokens=5), batch_size=2)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_answers_are_those_of_the_chat(assistant: Assistant, request: pytest.FixtureRequest, kind: str) -> None:
    found = evaluate(assistant, [source(request.getfixturevalue(kind))], SETTINGS)
    assert [prediction.target for prediction in found.predictions] == TEXTS
    for prediction, text in zip(found.predictions, TEXTS, strict=True):
        parts = [{"type": "image", "image": draw(text)}, {"type": "text", "text": "What is written there?"}]
        assert prediction.answer == assistant.chat([{"role": "user", "content": parts}], SETTINGS.options)
        assert prediction.prompt[0]["content"] == "<image>What is written there?"
        assert {"exact_match", "edit_distance", "loss", "token_accuracy"} <= set(prediction.scores)
    scores = found.total["answers"]
    assert {"exact_match", "edit_distance", "bleu"} <= set(scores)
    assert 0 <= found.total["prediction"]["token_accuracy"] <= 1


def test_loss_and_accuracy_are_those_of_the_models_own_logits(assistant: Assistant, parquet: Path) -> None:
    found = evaluate(assistant, [source(parquet)]).total["prediction"]
    assert assistant.reader is not None
    ends, rules = assistant.terminators, ImageRules()
    encoder = Encoder(assistant.tokenizer, ends, 500, reader=assistant.reader, rules=rules)
    losses, right = [], []
    for record, text in zip(read_sources([source(parquet)], encoder, None)[0].records, TEXTS, strict=True):
        (sample,) = record.samples
        pixels = assistant.reader.see([Image.open(io.BytesIO(draw(text)))]).inputs
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor(sample.labels[1:])
        with torch.no_grad():
            kinds = assistant.reader.kinds(sample.input_ids)
            logits = assistant.model(ids, **pixels, **kinds).logits[0, :-1]
        learnt = labels != IGNORE
        losses += torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], reduction="none").tolist()
        right += (logits.argmax(1) == labels)[learnt].tolist()
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(sum(right) / len(right))


def test_texts_and_images_are_measured_together(assistant: Assistant, parquet: Path, records: Path) -> None:
    both = evaluate(assistant, [source(parquet), SourceConfig(path=str(records))])
    tokens = [scores["prediction"]["tokens"] for scores in both.sources.values()]
    alone = evaluate(assistant, [SourceConfig(path=str(records))]).total["prediction"]
    assert both.total["prediction"]["tokens"] == sum(tokens)
    assert both.sources[records.name]["prediction"] == pytest.approx(alone)
    for prediction in evaluate(assistant, [SourceConfig(path=str(records), sample=2)], SETTINGS).predictions:
        assert not isinstance(prediction.prompt, str)
        assert prediction.answer == assistant.chat(prediction.prompt, SETTINGS.options)


def test_the_files_name_images_and_show_them(assistant: Assistant, parquet: Path, folder: Path, tmp_path: Path) -> None:
    found = evaluate(assistant, [source(parquet), source(folder)], SETTINGS)
    found.write(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"][0]["images"] == [f"{len(draw(TEXTS[0])):,} bytes"]
    assert rows[3]["prompt"][0]["images"] == [str(folder.parent / "0.png")]
    page = (tmp_path / "out" / "predictions.html").read_text()
    assert page.count("<img src='data:image/png;base64,") == 6
    assert not re.search(r"<script|(src|href)\s*=\s*['\"](?!data:)|url\(|@import", page)


def test_a_broken_image_is_named_by_its_place(assistant: Assistant, folder: Path) -> None:
    (folder.parent / "1.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"labels\.csv.*1\.png"):
        evaluate(assistant, [source(folder)])


def test_an_image_on_the_web_is_fetched_once_and_only_if_allowed(
    assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(url: str, name: str, limits: Any) -> bytes:
        if not limits.allow_urls:
            raise UsageError(f"{name} is on the web.")
        fetched.append(url)
        return draw("x")

    monkeypatch.setattr("lory.data.vision.images._fetch", fetch)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "https://example.com/x.png", "text": "x"}))
    with pytest.raises(UsageError, match="is on the web"):
        evaluate(assistant, [source(data)], SETTINGS)
    found = evaluate(assistant, [source(data)], replace(SETTINGS, fetch_images=True))
    assert fetched == ["https://example.com/x.png"]
    assert found.predictions[0].answer is not None
    assert found.predictions[0].prompt[0]["images"] == fetched
    assert "<img src='data:" in draw_page("m", found.predictions)


def test_a_model_that_reads_text_only_says_so(tiny_model: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="reads text only"):
        evaluate(load(tiny_model), [source(folder)])


# The page


def predicted(pairs: Sequence[tuple[str, str, float]], *images: bytes | str) -> list[Prediction]:
    """Answers of given distances from their targets, each with the same images."""
    prompt = [{"role": "user", "content": "<image>What?"}]
    media = tuple(Media("image", image) for image in images)
    return [
        Prediction("s", "answer", f"row {number}", prompt, target, answer, scores={"edit_distance": far}, images=media)
        for number, (answer, target, far) in enumerate(pairs)
    ]


def test_image_target_and_answer_stand_side_by_side_worst_first() -> None:
    evil = "<script>alert(1)</script>"
    made = predicted([(r"\alpha & x", r"\alpha & y", 0.2), (evil, "b", 1.0)], draw("x"))
    page = draw_page("m", made)
    assert re.findall(r"row \d", page) == ["row 1", "row 0"]
    assert page.count("class='both seen'") == 2
    assert re.findall(r"<h3>(image|target|answer)</h3>", page) == ["image", "target", "answer"] * 2
    assert "<script" not in page
    assert r"\alpha &amp; <del>y</del>" in page
    assert "img-src data:" in page


def test_images_are_shrunk_and_the_page_has_a_size() -> None:
    photo = Image.effect_noise((1500, 1000), 90)
    file = io.BytesIO()
    photo.save(file, "JPEG")
    page = draw_page("m", predicted([("a", "b", 0.5)], file.getvalue()))
    (url,) = re.findall(r"src='data:image/jpeg;base64,([^']+)'", page)
    assert max(Image.open(io.BytesIO(base64.b64decode(url))).size) == 480
    many = predicted([("a", "b", 0.5)] * 3, draw("x"), draw("y"))
    page = draw_page("m", many, Thumbnails(most_bytes=len(draw("x"))))
    assert page.count("<img") + page.count("left out, since the page is full") == 6
    assert 1 <= page.count("<img") <= 2


def test_an_image_that_is_gone_is_said_on_the_page(tmp_path: Path) -> None:
    page = draw_page("m", predicted([("a", "b", 0.5)], str(tmp_path / "<gone>.png")))
    assert "does not exist" in page
    assert "<gone>" not in page


# Formulas


def test_formulas_are_compared_by_their_tokens() -> None:
    assert " ".join(split_formula(r"\frac{a}{b_{12}} \, \{x")) == r"\frac { a } { b _ { 1 2 } } \, \{ x"
    answers, targets = [r"\frac{a}{b}", r"\sqrt { x }"], [r"\frac { a } { b }", r"\sqrt { y }"]
    scores = score_formulas(answers, targets)
    assert scores["exact_match"] == 0.5
    assert scores["edit_distance"] == pytest.approx(0.5 * 1 / 4)
    assert 0 < scores["bleu"] < 100
    assert score_formulas(targets, targets)["bleu"] == pytest.approx(100)
    assert "bleu" not in score_formulas(targets, targets, with_bleu=False)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [([r"\alpha", "x + 1"], True), ([r"\alpha", "yes", "no"], False), ([r"C:\1"], False), ([], False)],
)
def test_formulas_are_told_from_other_texts(texts: list[str], expected: bool) -> None:
    assert are_formulas(texts) is expected


def test_scores_of_formulas_stand_beside_those_of_texts(assistant: Assistant, parquet: Path) -> None:
    found = evaluate(assistant, [source(parquet)], SETTINGS)
    assert "formulas" not in found.total["answers"]
    formulas = source(parquet, filter={"text": TEXTS[1]})
    found = evaluate(assistant, [formulas], SETTINGS)
    assert set(found.total["answers"]["formulas"]) == {"exact_match", "edit_distance", "bleu"}
    assert "formula_edit_distance" in found.predictions[0].scores
    assert isinstance(found, Evaluation)
