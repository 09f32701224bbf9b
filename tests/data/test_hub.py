"""Data sets on Hugging Face and ModelScope are read by owner/name, from servers on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.data.web import Answer, Site, serve

from lory.data.sources.hub import guess_hub, looks_like_repo
from lory.data.sources.read import SourceConfig, open_source, read_source
from lory.runtime import LoryError, UsageError

pytest.importorskip("datasets")

CARD = b"""---
configs:
- config_name: en
  default: true
  data_files: [{split: train, path: en/train.jsonl}, {split: test, path: en/test.jsonl}]
- config_name: zh
  data_files: [{split: train, path: zh.jsonl}]
---
"""


def lines(*questions: str) -> bytes:
    return b"".join(json.dumps({"query": question, "response": "a"}).encode() + b"\n" for question in questions)


FILES = {
    "README.md": CARD,
    "en/train.jsonl": lines(*(f"q{n}" for n in range(10))),
    "en/test.jsonl": lines("t"),
    "zh.jsonl": lines("z"),
}


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def modelscope(files: dict[str, bytes], base: str = "/api/v1/datasets/owner/set/repo") -> Site:
    """A site that answers as ModelScope's API does."""

    def tree(query: str, _: dict[str, str]) -> Answer:
        page = int(urllib.parse.parse_qs(query)["PageNumber"][0])
        entries = [
            {"Path": path, "Type": "blob", "Size": len(body), "Sha256": digest(body)} for path, body in files.items()
        ]
        listed = [{"Path": "en", "Type": "tree"}] * 99 + entries  # over two pages
        shown = listed[(page - 1) * 100 : page * 100]
        return 200, {}, json.dumps({"Code": 200, "Success": True, "Data": {"Files": shown}}).encode()

    def file(query: str, _: dict[str, str]) -> Answer:
        path = urllib.parse.parse_qs(query)["FilePath"][0]
        return (200, {}, files[path]) if path in files else (404, {}, b"")

    return Site(answers={f"{base}/tree": tree, base: file})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("LORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with serve(modelscope(dict(FILES))) as site:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", site.url)
        yield site


def read(**fields: Any) -> list[str]:
    config = SourceConfig(**{"path": "owner/set", "source": "modelscope", **fields})
    return [conversation.messages[0].content for conversation in open_source(config)]


@pytest.mark.parametrize("streaming", [False, True])
def test_modelscope_gives_subsets_splits_and_slices(streaming: bool, site: Site) -> None:
    assert read(streaming=streaming) == [f"q{n}" for n in range(10)]
    assert read(streaming=streaming, subset="zh") == ["z"]
    assert read(streaming=streaming, split="test") == ["t"]
    assert read(streaming=streaming, split="train[2:4]+test") == ["q2", "q3", "t"]
    assert read(streaming=streaming, subset="zh/en", split="train[:3]") == ["z", "q0", "q1"]


def test_shares_need_a_length(site: Site) -> None:
    with pytest.raises(UsageError, match="does not say how many rows it has"):
        read(split="train[:20%]", streaming=True)
    assert read(split="train[-20%:]") == ["q8", "q9"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_reader_goes_on_where_it_was(streaming: bool, site: Site) -> None:
    config = SourceConfig(path="owner/set", source="modelscope", streaming=streaming)
    assert [conversation.where for conversation in open_source(config, 8)] == [
        "owner/set train row 9",
        "owner/set train row 10",
    ]


def test_files_are_fetched_once_and_used_without_a_network(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SourceConfig(path="owner/set", source="modelscope")
    first = read_source(config)
    fetched = [path for _, path, _ in site.asked if "FilePath" in path]
    assert len(fetched) == 4
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert read_source(config) == first
    with pytest.raises(LoryError, match="could not be downloaded"):
        read(path="owner/other")


def test_a_changed_file_is_fetched_again(site: Site, tmp_path: Path) -> None:
    config = SourceConfig(path="owner/set", source="modelscope", subset="zh")
    first = read_source(config)
    changed = modelscope({**FILES, "zh.jsonl": lines("new")})
    site.answers = changed.answers
    second = read_source(config)
    assert second.conversations[0].messages[0].content == "new"
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"../../evil.jsonl": b"{}"}, "lists the file '../../evil.jsonl', which would be written outside"),
        ({"/etc/evil.jsonl": b"{}"}, "would be written outside"),
        ({"loader.py": b"print(1)"}, "has no data files that are known"),
    ],
)
def test_what_modelscope_may_not_list_is_refused(files: dict[str, bytes], problem: str, site: Site) -> None:
    site.answers = modelscope(files).answers
    with pytest.raises(UsageError) as caught:
        read()
    assert problem in str(caught.value)


def test_other_bytes_than_listed_are_refused(site: Site) -> None:
    site.answers["/api/v1/datasets/owner/set/repo"] = lambda *_: (200, {}, b"something else")
    with pytest.raises(LoryError, match="came with other bytes than ModelScope lists"):
        read()


def test_a_data_set_may_be_too_large(site: Site) -> None:
    with pytest.raises(UsageError, match="raise the source's 'max_bytes' from 100"):
        read(max_bytes=100)


def test_a_wrong_subset_split_or_name_is_told(site: Site) -> None:
    with pytest.raises(UsageError, match=r"owner/set could not be opened: .*'fr' not found.*en.*zh"):
        read(subset="fr")
    with pytest.raises(UsageError, match=r"owner/set has no split 'dev'; it has train, test\."):
        read(split="dev")
    with pytest.raises(UsageError, match="404"):
        read(path="owner/none")


def test_a_token_is_sent_to_modelscope(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    seen = []
    tree = site.answers["/api/v1/datasets/owner/set/repo/tree"]

    def check(query: str, headers: dict[str, str]) -> Answer:
        seen.append(headers.get("Authorization"))
        return tree(query, headers)

    site.answers["/api/v1/datasets/owner/set/repo/tree"] = check
    read()
    assert set(seen) == {"Bearer secret"}


def test_the_owner_says_the_hub_unless_the_source_does() -> None:
    assert guess_hub("AI-ModelScope/alpaca-gpt4-data-zh") == "modelscope"
    assert guess_hub("tatsu-lab/alpaca") == "hf"
    assert looks_like_repo("tatsu-lab/alpaca")
    assert not any(looks_like_repo(path) for path in ("a", "a/b/c", "../a", "data/a.jsonl", "/a/b", "a/b c"))


def test_a_slip_in_a_path_does_not_go_to_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    with pytest.raises(UsageError, match=r"data/train does not exist; .*For the data set data/train on a hub, set"):
        open_source(SourceConfig(path="data/train"))


def test_offline_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"owner/never is no local file .* the hub is switched off \(HF_HUB_OFFLINE\)"):
        open_source(SourceConfig(path="owner/never"))


COMMIT = "a" * 40
PROGRAM = """
import json, sys
from lory.data.sources.read import SourceConfig, read_source
from lory.runtime import UsageError
for fields in json.loads(sys.argv[1]):
    try:
        source = read_source(SourceConfig(**fields))
        print(json.dumps([[c.messages[0].content for c in source.conversations], source.fingerprint]))
    except UsageError as error:
        print(json.dumps(str(error)))
"""


def hugging_face() -> Site:
    """A site that answers as Hugging Face's API does."""

    def entry(path: str) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(FILES[path]), "oid": digest(FILES[path])[:40]}

    class Hub(Site):
        def answer(self, path: str, headers: dict[str, str]) -> Answer:
            place = urllib.parse.unquote(path.partition("?")[0])
            kind = {"Content-Type": "application/json", "X-Repo-Commit": COMMIT}
            if not place.removeprefix("/api").startswith("/datasets/owner/set"):
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            if "/resolve/" in place:
                body = FILES.get(place.partition("/resolve/")[2].partition("/")[2])
                if body is None:
                    return 404, kind | {"X-Error-Code": "EntryNotFound"}, b""
                return 200, kind | {"ETag": f'"{digest(body)[:40]}"'}, body
            if "/tree/" in place:
                inside = place.partition("/tree/")[2].partition("/")[2]
                return 200, kind, json.dumps([entry(path) for path in FILES if path.startswith(inside)]).encode()
            if "/paths-info/" in place:
                folders = [{"type": "directory", "path": "en", "oid": "b" * 40}]
                return 200, kind, json.dumps([entry(path) for path in FILES] + folders).encode()
            siblings = [{"rfilename": path} for path in FILES]
            about = {"id": "owner/set", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
            return 200, kind, json.dumps(about).encode()

    return Hub()


@pytest.mark.slow
def test_hugging_face_gives_subsets_splits_and_slices(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"path": "owner/set"},
        {"path": "owner/set", "subset": "zh"},
        {"path": "owner/set", "split": "train[:20%]+test"},
        {"path": "owner/set", "streaming": True, "split": "train[8:]"},
        {"path": "owner/set", "subset": "fr"},
        {"path": "owner/set", "split": "dev"},
    ]
    with serve(hugging_face()) as site:
        # the endpoint is read when the library is imported, so it takes a process of its own
        env = {**os.environ, "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_OFFLINE": "0", "LORY_CACHE": str(tmp_path), "no_proxy": "*"}
        command = [sys.executable, "-c", PROGRAM, json.dumps(sources)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, zh, parts, stream, subset, split = map(json.loads, done.stdout.splitlines())
    assert whole[0] == [f"q{n}" for n in range(10)]
    assert (zh[0], parts[0], stream[0]) == (["z"], ["q0", "q1", "t"], ["q8", "q9"])
    assert whole[1] == stream[1] != zh[1]
    assert "'fr' not found" in subset
    assert split == "owner/set has no split 'dev'; it has train, test."
