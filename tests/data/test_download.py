"""A file is downloaded once, whole, from the web alone, and within its limit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.data.web import Site, serve

from lory.data.sources.download import download, is_url
from lory.data.sources.read import SourceConfig, read_source
from lory.runtime import LoryError, UsageError

CONTENT = b"".join(b'{"text": "line %d"}\n' % n for n in range(5000))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("LORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with serve(Site(files={"/a.jsonl": CONTENT})) as site:
        yield site


def test_a_file_is_fetched_once_and_kept_by_its_content(site: Site) -> None:
    site.files["/b.jsonl"] = CONTENT
    first = download(f"{site.url}/a.jsonl", 10**6)
    assert first.path.read_bytes() == CONTENT
    assert first.path.name == hashlib.sha256(CONTENT).hexdigest()
    assert download(f"{site.url}/a.jsonl", 10**6) == first
    assert len(site.asked) == 1
    assert download(f"{site.url}/b.jsonl", 10**6).path == first.path


@pytest.mark.parametrize("breaks", [[1000], [1000, 20], [0, 0]])
def test_a_broken_download_goes_on_where_it_broke(breaks: list[int], site: Site) -> None:
    site.break_after = list(breaks)
    assert download(f"{site.url}/a.jsonl", 10**6).path.read_bytes() == CONTENT
    assert len(site.asked) == len(breaks) + 1
    done = sum(breaks)
    assert site.asked[-1][2] == (f"bytes={done}-" if done else None)


def test_another_run_goes_on_and_another_file_starts_anew(site: Site) -> None:
    url = f"{site.url}/a.jsonl"
    site.break_after = [1000, 10, 10]
    with pytest.raises(LoryError, match="broke off after"):
        download(url, 10**6)
    site.files["/a.jsonl"] = changed = CONTENT.upper()
    assert download(url, 10**6).path.read_bytes() == changed


def test_a_whole_part_is_not_lost_its_file_is_fetched_again(site: Site) -> None:
    url = f"{site.url}/a.jsonl"
    target = download(url, 10**6).path
    index = next(target.parent.glob("*.json"))
    index.unlink()
    target.rename(index.with_suffix(".part"))
    index.with_suffix(".etag").write_text(f'"{hashlib.sha256(CONTENT).hexdigest()}"')
    assert download(url, 10**6).path.read_bytes() == CONTENT


def test_the_size_is_limited_even_when_the_server_hides_it(site: Site) -> None:
    with pytest.raises(UsageError, match="has more than 1,000 bytes; raise the source's 'max_bytes'"):
        download(f"{site.url}/a.jsonl", 1000)
    site.answers["/hidden"] = lambda *_: (200, {"Content-Length": "", "Connection": "close"}, CONTENT)
    with pytest.raises(UsageError, match="has more than 1,000 bytes"):
        download(f"{site.url}/hidden", 1000)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.jsonl", "data:text/plain,x"])
def test_a_redirect_stays_on_the_web(target: str, site: Site) -> None:
    site.answers["/away"] = lambda *_: (302, {"Location": target}, b"")
    with pytest.raises(LoryError, match=r"is not followed|could not be downloaded"):
        download(f"{site.url}/away", 1000)
    site.answers["/moved"] = lambda *_: (302, {"Location": "/a.jsonl"}, b"")
    assert download(f"{site.url}/moved", 10**6).url == f"{site.url}/a.jsonl"


def test_what_the_server_refuses_is_told(site: Site) -> None:
    with pytest.raises(UsageError, match=r"/none could not be downloaded: the server says 404 Not Found\."):
        download(f"{site.url}/none", 1000)


def test_a_server_in_trouble_is_asked_again(site: Site) -> None:
    answers = [503, 200]
    site.answers["/busy"] = lambda *_: (answers.pop(0), {}, b"x")
    assert download(f"{site.url}/busy", 1000).path.read_bytes() == b"x"
    answers += [503, 503, 503]
    with pytest.raises(LoryError, match=r"/busy\?2 could not be downloaded: Service Unavailable"):
        download(f"{site.url}/busy?2", 1000)


def test_an_address_may_have_any_letters(site: Site) -> None:
    site.files["/%E4%BD%A0%20a.jsonl"] = b"x"
    assert download(f"{site.url}/你 a.jsonl", 1000).path.read_bytes() == b"x"


def test_without_a_network_the_address_is_named(site: Site) -> None:
    url = site.url.rpartition(":")[0] + ":9/a.jsonl"
    with pytest.raises(LoryError, match=r":9/a.jsonl could not be downloaded: .*refused"):
        download(url, 1000)


def test_an_address_is_a_source(site: Site) -> None:
    source = read_source(SourceConfig.model_validate(f"{site.url}/a.jsonl#3"))
    assert (source.name, source.read, len(source.conversations)) == ("a.jsonl", 5000, 3)
    assert source.conversations[0].where.startswith(f"{site.url}/a.jsonl line ")
    assert source.fingerprint == hashlib.sha256(CONTENT).hexdigest()
    # where the address has no ending, that to which it leads counts
    site.answers["/latest"] = lambda *_: (302, {"Location": "/a.jsonl"}, b"")
    assert read_source(SourceConfig(path=f"{site.url}/latest")).read == 5000
    site.files["/page"] = b"<html>"
    with pytest.raises(UsageError, match="does not end like a data file"):
        read_source(SourceConfig(path=f"{site.url}/page"))


def test_addresses_are_known() -> None:
    assert is_url("https://a/b.jsonl")
    assert is_url("HTTP://a/b.jsonl")
    assert not is_url("file:///a")
    assert not is_url("a/https://b")
