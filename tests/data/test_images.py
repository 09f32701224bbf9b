"""An image is opened wherever it comes from, as RGB and upright, or refused in one sentence; sizes are Qwen2-VL's."""

from __future__ import annotations

import base64
import io
import logging
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.data.web import Site, serve

from lory.data.vision.images import ImageLimits, fit_size, is_public, open_image, shrink_image
from lory.runtime import UsageError

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def save(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def claim(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has this size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def picture() -> Image.Image:
    """6 x 4, red but for a blue upper left corner of 2 x 2."""
    image = Image.new("RGB", (6, 4), RED)
    image.paste(BLUE, (0, 0, 2, 2))
    return image


@pytest.fixture
def root(tmp_path: Path, picture: Image.Image) -> Path:
    """A folder with an image, beside a file that is nobody's business."""
    folder = tmp_path / "media"
    folder.mkdir()
    picture.save(folder / "a.png")
    picture.save(tmp_path / "secret.png")
    return folder


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


def test_a_path_bytes_a_data_url_and_an_image_are_the_same_image(root: Path, picture: Image.Image) -> None:
    data = (root / "a.png").read_bytes()
    for source in (str(root / "a.png"), data, data_url(data), data_url(data, ""), picture):
        assert same(open_image(source, root), picture)


def test_a_path_starts_at_the_working_directory(
    root: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    assert same(open_image("media/a.png", Path("media")), picture)
    with pytest.raises(UsageError, match=r"The image 'a\.png' leads out of the folder media"):
        open_image("a.png", Path("media"))


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "link.png", "folder/secret.png"])
def test_no_path_leads_out_of_the_folder(root: Path, path: str) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    with pytest.raises(UsageError, match="leads out of the folder"):
        open_image(str(root / path), root)


def test_a_link_inside_of_the_folder_is_followed(root: Path, picture: Image.Image) -> None:
    (root / "link.png").symlink_to("a.png")
    assert same(open_image(str(root / "link.png"), root), picture)


def test_nothing_is_told_of_files_elsewhere(root: Path) -> None:
    told = []
    for name in ("secret.png", "none.png"):
        with pytest.raises(UsageError) as caught:
            open_image(str(root.parent / name), root)
        told.append(str(caught.value).replace(name, ""))
    assert told[0] == told[1]


def test_without_a_folder_no_path_is_opened(root: Path) -> None:
    with pytest.raises(UsageError, match="is a path, and files are not opened here"):
        open_image(str(root / "a.png"), None)


def test_what_is_no_readable_file_is_refused(root: Path) -> None:
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "empty.png").touch()
    cases = {
        "none.png": "does not exist; paths start at",
        "a.png/b": "could not be read: Not a directory",
        "": "is no file",
        "pipe": "is no file",
        "loop": "could not be read",
        "nul\0l": "could not be read",
        "x" * 300: "could not be read: File name too long",
        "empty.png": "has zero bytes",
    }
    for path, reason in cases.items():
        with pytest.raises(UsageError, match=reason):
            open_image(f"{root}/{path}", root)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "The image of 0 bytes has zero bytes"),
        (b"no image at all", "is none of the known formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of the known formats"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
        (b"\xef\xbb\xbf <?xml version='1.0'?>\n<!-- a drawing -->\n<svg/>", "is SVG"),
        ("data:image/png,abc", "another kind than data:image/...;base64"),
        ("data:image/png;base64,a===", "whose base64 is broken"),
        ("data:text/html;base64,aGk=", "of the type text/html, but an image is expected"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "is SVG"),
        ("ftp://example.org/a.png", "address of another kind"),
        ("file:///etc/passwd", "address of another kind"),
        ("http://example.org/a.png", "is on the web, and nothing is fetched here"),
    ],
)
def test_what_is_no_image_is_refused(source: str | bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        open_image(source, Path())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused(format: str, kept: float) -> None:
    noise = Image.effect_noise((60, 40), 90).convert("RGB")
    data = save(noise, format)
    assert open_image(data, None).size == (60, 40)
    with pytest.raises(UsageError, match=r"is truncated or damaged|is none of the known formats"):
        open_image(data[: int(len(data) * kept)], None)


def test_a_damaged_image_is_refused() -> None:
    data = bytearray(save(Image.effect_noise((60, 40), 90)))
    data[60] ^= 255
    with pytest.raises(UsageError, match=r"The image of .* bytes is truncated or damaged"):
        open_image(bytes(data), None)


@pytest.mark.parametrize("side", [8_000, 20_000])
def test_a_bomb_is_refused_by_its_pixels(side: int) -> None:
    with pytest.raises(UsageError, match=r"pixels.* limit of 50,000,000"):
        open_image(claim(side, side), None)


def test_limits_are_those_that_were_given(root: Path, picture: Image.Image) -> None:
    data = save(picture)
    assert open_image(data, None, ImageLimits(max_pixels=24, max_bytes=len(data))).size == (6, 4)
    for source in (data, picture):
        with pytest.raises(UsageError, match="has 6 x 4 pixels, more than the limit of 23"):
            open_image(source, None, ImageLimits(max_pixels=23))
    for given in (data, data_url(data), str(root / "a.png")):
        with pytest.raises(UsageError, match="has more than 40 bytes"):
            open_image(given, root, ImageLimits(max_bytes=40))


def test_one_pixel_is_an_image() -> None:
    assert open_image(save(Image.new("L", (1, 1), 255)), None).getpixel((0, 0)) == WHITE


def test_of_an_animation_the_first_frame_is_taken_and_said(
    picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lory")
    other = Image.new("RGB", picture.size, "green")
    for format in ("GIF", "PNG", "WEBP"):
        data = save(
            picture, format, save_all=True, append_images=[other], **({"lossless": True} if format == "WEBP" else {})
        )
        caplog.clear()
        assert same(open_image(data, None), picture)
        assert "has several frames; the first is taken" in caplog.text
    caplog.clear()
    open_image(save(picture), None)
    assert not caplog.text


def test_an_image_that_was_turned_is_set_upright(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = open_image(save(picture, "PNG", exif=exif), None)
    assert upright.size == (4, 6)
    assert (upright.getpixel((3, 0)), upright.getpixel((0, 0))) == (BLUE, RED)


def test_transparency_is_white(picture: Image.Image) -> None:
    alpha = picture.convert("RGBA")
    alpha.putpixel((0, 0), (0, 0, 0, 0))
    alpha.putpixel((5, 3), (*RED, 128))
    shown = open_image(save(alpha), None)
    assert [shown.getpixel(place) for place in ((0, 0), (1, 1), (5, 3))] == [WHITE, BLUE, (255, 127, 127)]
    palette = picture.quantize(4)
    shown = open_image(save(palette, transparency=palette.getpixel((0, 0))), None)
    assert [shown.getpixel(place) for place in ((0, 0), (5, 3))] == [WHITE, RED]
    grey = save(Image.new("LA", (1, 1), (9, 0)))
    assert open_image(grey, None).getpixel((0, 0)) == WHITE


def test_cmyk_becomes_rgb(picture: Image.Image) -> None:
    shown = open_image(save(picture.convert("CMYK"), "TIFF"), None)
    assert same(shown, picture)
    assert open_image(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), None).getpixel((4, 4))[0] > 240


def test_sixteen_bits_keep_their_shades() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    data = save(Image.fromarray(values))
    shown = open_image(data, None)
    assert [shown.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    with pytest.raises(UsageError, match="has floating-point pixels"):
        open_image(Image.new("F", (2, 2)), None)


def test_a_long_source_is_named_shortly(picture: Image.Image) -> None:
    with pytest.raises(UsageError) as caught:
        open_image("data:image/png;base64," + "A" * 100_000, None)
    assert len(str(caught.value)) < 250
    with pytest.raises(UsageError, match=r"'a\?b\.png'"):
        open_image("a\nb.png", None)


HERE = ImageLimits(allow_urls=True, private_hosts=frozenset({"localhost"}), timeout_seconds=5)


@pytest.fixture
def site(picture: Image.Image) -> Iterator[Site]:
    with serve(Site(files={"/a.png": save(picture)})) as site:
        site.url = site.url.replace("127.0.0.1", "localhost")
        yield site


def test_an_address_is_fetched_where_it_is_allowed(site: Site, picture: Image.Image) -> None:
    site.answers["/moved"] = lambda *_: (302, {"Location": "/a.png"}, b"")
    for path in ("/a.png", "/moved", "/a.png?of=ä b"):
        site.files[path.replace("ä b", "%C3%A4%20b")] = site.files["/a.png"]
        assert same(open_image(site.url + path, None, HERE), picture)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "10.0.0.1",
        "[fe80::1]",
    ],
)
def test_no_private_address_is_called(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was called"))
    with pytest.raises(UsageError, match=r"is not on the public net|could not be fetched: \["):
        open_image(f"http://{host}/a.png", None, HERE)


def test_no_name_leads_to_a_private_address(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "192.168.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was called"))
    with pytest.raises(UsageError, match=r"the server 'images\.example', which is not on the public net"):
        open_image("https://images.example/a.png", None, HERE)


def test_the_address_that_was_checked_is_the_one_that_is_called(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **options: Any) -> Any:
        if not host[0].isdigit() and ":" not in host:
            looked_up.append(host)
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    open_image(f"{site.url}/a.png", None, HERE)
    assert looked_up == ["localhost"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://127.0.0.1:{port}/a.png", "on the server '127.0.0.1', which is not on the public net"),
        ("file:///etc/passwd", "such a redirect is not followed"),
        ("/again", "more than 5 addresses in a row"),
    ],
)
def test_a_redirect_is_checked_as_well(site: Site, target: str, reason: str) -> None:
    location = target.format(port=site.url.rsplit(":", 1)[1])
    site.answers["/again"] = lambda *_: (302, {"Location": location}, b"")
    with pytest.raises(UsageError, match=reason):
        open_image(f"{site.url}/again", None, HERE)
    assert all(path == "/again" for _, path, _ in site.asked)


def test_what_a_server_does_wrong_is_said(site: Site) -> None:
    site.answers["/endless"] = lambda *_: (200, {"Content-Length": "1000000000"}, b"")
    site.break_after = [20]
    cases = {
        "/a.png": "broke off after 20 of",
        "/none.png": "the server says 404",
        "/endless": "has more than 50,000,000",
    }
    for path, reason in cases.items():
        with pytest.raises(UsageError, match=reason):
            open_image(site.url + path, None, HERE)
    with pytest.raises(UsageError, match=r"could not be fetched: .*refused"):
        open_image("http://localhost:1/a.png", None, HERE)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"])
def test_a_slow_server_is_left_after_the_time_limit(answer: bytes) -> None:
    limits = ImageLimits(allow_urls=True, private_hosts=frozenset({"127.0.0.1"}), timeout_seconds=0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        begin = time.monotonic()

        def drip() -> None:
            line, _ = server.accept()
            with line:
                line.sendall(answer)
                while time.monotonic() < begin + 2:
                    time.sleep(0.05)
                    try:
                        line.sendall(b"X" if answer else b"HTTP/1.1 200 OK\r\n"[:1])
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(UsageError, match=r"it took longer than 0\.3 seconds"):
            open_image(f"http://127.0.0.1:{server.getsockname()[1]}/", None, limits)
        assert time.monotonic() - begin < 1.5
        thread.join()


def test_public_addresses_are_told_from_others() -> None:
    public = ["93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
    others = [
        "127.0.0.1",
        "100.64.0.1",
        "172.16.3.4",
        "224.0.0.1",
        "240.0.0.1",
        "::",
        "fc00::1",
        "fe80::1%eth0",
        "ff02::1",
    ]
    inside = ["::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]
    assert [address for address in public if not is_public(address)] == []
    assert [address for address in others + inside if is_public(address)] == []


SIZES = [(1, 1), (3, 500), (27, 29), (28, 28), (42, 70), (100, 100), (333, 222), (1080, 1920), (4000, 3000), (13, 2600)]


@pytest.mark.parametrize("bounds", [(56 * 56, 28 * 28 * 1280), (28 * 28 * 4, 28 * 28 * 64)])
@pytest.mark.parametrize("factor", [28, 32])
def test_sizes_are_those_of_transformers(bounds: tuple[int, int], factor: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height, width in SIZES:
        expected = smart_resize(height, width, factor, *bounds)
        assert fit_size(height, width, bounds[1], bounds[0], factor) == expected


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="has one side more than 200 times the other"):
        fit_size(1, 201, 10**6, 1)
    with pytest.raises(UsageError, match="cannot be made one of 784 to 800"):
        fit_size(10, 1900, 800, 784)
    for most, least in ((783, 1), (1000, 2000), (1000, 0)):
        with pytest.raises(UsageError, match="were asked for"):
            fit_size(100, 100, most, least)


def test_an_image_is_shrunk_to_its_size(picture: Image.Image) -> None:
    small = shrink_image(Image.new("RGB", (1000, 500), RED), 28 * 28 * 32, 28 * 28)
    assert (small.size, small.getpixel((30, 30))) == ((224, 112), RED)
    assert shrink_image(small) is small
    assert shrink_image(picture).size == (84, 56)
