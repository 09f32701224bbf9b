"""Pictures are opened when they are named, and kept as they are."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from lory.chat.pictures import mark_pictures, open_picture
from lory.runtime import UsageError


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "my photo.jpg"
    Image.new("RGB", (4, 3), "red").save(path)
    return path


def test_a_file_keeps_its_bytes_and_a_data_url_its_own(photo: Path) -> None:
    picture = open_picture(str(photo))
    assert (picture.name, picture.data) == (str(photo), photo.read_bytes())
    assert picture.data_url.startswith("data:image/jpeg;base64,")
    assert open_picture(picture.data_url).data == open_picture(picture.data).data == picture.data
    assert base64.b64decode(picture.data_url.partition(",")[2]) == picture.data


def test_what_is_fetched_is_kept_as_it_was_seen(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lory.data.vision.images._fetch", lambda *_: photo.read_bytes())
    picture = open_picture("https://example.com/photo.jpg")
    assert picture.name == "https://example.com/photo.jpg"
    assert Image.open(io.BytesIO(picture.data)).size == (4, 3)


def test_a_path_may_begin_at_home(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(photo.parent))
    assert open_picture("~/my photo.jpg").data == photo.read_bytes()


@pytest.mark.parametrize("source", ["missing.png", "ftp://example.com/a.png", "data:text/plain;base64,AAAA"])
def test_what_is_no_image_is_refused_in_one_sentence(source: str) -> None:
    with pytest.raises(UsageError):
        open_picture(source)


def test_a_root_is_kept_to(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(UsageError, match="leads out of the folder"):
        open_picture(str(photo), tmp_path / "inner")


def test_each_picture_has_a_mark(photo: Path) -> None:
    picture = open_picture(str(photo))
    assert mark_pictures("What is it?", ()) == "What is it?"
    assert mark_pictures("What is it?", [picture, picture]) == "<image><image>What is it?"
    assert mark_pictures("Is <image> like <image>?", [picture, picture]) == "Is <image> like <image>?"
    with pytest.raises(UsageError, match="has 1 <image> for 2 images"):
        mark_pictures("Is <image> red?", [picture, picture])
