"""Encoding gives the same samples in the same order, however many processes do it, fresh or out of the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from lory.data.encoding import cache, workers
from lory.data.encoding.cache import encode_source
from lory.data.encoding.encode import Encoder
from lory.data.encoding.store import SAMPLES, SUMMARY, Store
from lory.data.sources.read import SourceConfig
from lory.runtime import UsageError

ChatTokenizer = Callable[[str], tuple[Any, tuple[int, ...]]]


def write_sums(path: Path, count: int = 700) -> SourceConfig:
    """Records of which some repeat, near and far, and some have no answer."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = number % 500 if number % 7 else 3
            record = {"query": f"{question} + {question}? 你好", "response": str(2 * question) if number % 11 else ""}
            file.write(json.dumps(record) + "\n")
    return SourceConfig(path=str(path))


@pytest.fixture
def encoder(chat_tokenizer: ChatTokenizer) -> Encoder:
    return Encoder(*chat_tokenizer("chatml"), 512)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def contents(store: Store) -> tuple[Any, ...]:
    samples = [store.sample(number) for number in range(len(store))]
    places = [store.place(number) for number in range(len(store.first))]
    return samples, store.first.tolist(), store.count.tolist(), places, vars(store.summary)


def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_CHUNK", 64)
    source = write_sums(tmp_path / "sums.jsonl")
    one, two, four = (contents(encode_source(source, encoder, False, count)) for count in (1, 2, 4))
    assert one == two == four
    assert 400 < len(one[0]) < 500 < len(one[1])


def test_processes_are_started_once_there_is_enough_to_do(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_sums(tmp_path / "sums.jsonl")
    expected = contents(encode_source(source, encoder, False, 1))
    monkeypatch.setattr(workers, "_WORTH_PROCESSES", 100)
    monkeypatch.setattr(workers, "_CHUNK", 64)
    assert contents(encode_source(source, encoder, False, None)) == expected


def test_what_was_forgotten_is_encoded_again(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_sums(tmp_path / "sums.jsonl")
    usual = encode_source(source, encoder, False, 1)
    monkeypatch.setattr("lory.data.encoding.store._REMEMBERED", 1)
    small = encode_source(source, encoder, False, 2)
    assert len(small) > len(usual)
    taken = [[store.sample(int(first)) for first in store.first[store.count > 0]] for store in (small, usual)]
    assert taken[0] == taken[1]


def test_an_error_in_a_process_names_its_place(tmp_path: Path, chat_tokenizer: ChatTokenizer) -> None:
    source = write_sums(tmp_path / "sums.jsonl")
    strict = Encoder(*chat_tokenizer("chatml"), 8, "error")
    for count in (1, 2):
        with pytest.raises(UsageError, match=r"sums\.jsonl line 2: \d+ tokens, more than data\.max_tokens"):
            encode_source(source, strict, False, count)


def test_a_second_run_reads_the_cache(
    tmp_path: Path, encoder: Encoder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_sums(tmp_path / "sums.jsonl")
    fresh = contents(encode_source(source, encoder, True, 1))
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(cache, "encode_all", lambda *_: pytest.fail("it was encoded again"))
    assert contents(encode_source(source, encoder, True, 1)) == fresh


def test_a_renamed_file_is_no_change_and_a_changed_byte_is_one(
    tmp_path: Path, encoder: Encoder, own_cache: Path
) -> None:
    source = write_sums(tmp_path / "sums.jsonl")
    encode_source(source, encoder, True, 1)
    other = tmp_path / "renamed.jsonl"
    Path(source.path).rename(other)
    encode_source(SourceConfig(path=str(other)), encoder, True, 1)
    assert len(list(own_cache.iterdir())) == 1
    text = other.read_text(encoding="utf-8")
    other.write_text(text.replace('"4"', '"5"', 1), encoding="utf-8")
    encode_source(SourceConfig(path=str(other)), encoder, True, 1)
    assert len(list(own_cache.iterdir())) == 2


def test_other_rules_templates_and_tokenizers_have_stores_of_their_own(
    tmp_path: Path, chat_tokenizer: ChatTokenizer, own_cache: Path
) -> None:
    source = write_sums(tmp_path / "sums.jsonl", 20)
    encoders = [
        Encoder(*chat_tokenizer("chatml"), 512),
        Encoder(*chat_tokenizer("chatml"), 511),
        Encoder(*chat_tokenizer("chatml"), 512, loss_on="last"),
        Encoder(*chat_tokenizer("llama3"), 512),
    ]
    for number, encoder in enumerate(encoders, 1):
        encode_source(source, encoder, True, 1)
        assert len(list(own_cache.iterdir())) == number
    encode_source(SourceConfig(path=source.path, system="Be brief."), encoders[0], True, 1)
    assert len(list(own_cache.iterdir())) == 5


def test_a_damaged_store_is_made_anew(tmp_path: Path, encoder: Encoder, own_cache: Path) -> None:
    source = write_sums(tmp_path / "sums.jsonl", 50)
    expected = contents(encode_source(source, encoder, True, 1))
    (folder,) = own_cache.iterdir()
    for name in (SAMPLES, SUMMARY):
        (folder / name).write_bytes(b"no store")
        assert contents(encode_source(source, encoder, True, 1)) == expected


def test_the_oldest_stores_go_when_the_cache_is_full(
    tmp_path: Path, encoder: Encoder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_sums(tmp_path / f"{count}.jsonl", count) for count in (20, 30, 40)]
    for source in sources:
        encode_source(source, encoder, True, 1)
    monkeypatch.setattr(cache, "_MOST_BYTES", 1)
    encode_source(write_sums(tmp_path / "last.jsonl", 50), encoder, True, 1)
    assert len(list(own_cache.iterdir())) == 1


def test_the_same_bytes_read_as_something_else_are_another_source(
    tmp_path: Path, encoder: Encoder, own_cache: Path
) -> None:
    source = write_sums(tmp_path / "sums.jsonl", 20)
    records = encode_source(source, encoder, True, 1)
    other = Path(source.path).rename(tmp_path / "sums.txt")
    lines = encode_source(SourceConfig(path=str(other)), encoder, True, 1)
    assert len(list(own_cache.iterdir())) == 2
    assert lines.lengths.tolist() != records.lengths.tolist()


def test_a_cache_that_cannot_be_written_to_is_done_without(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_sums(tmp_path / "sums.jsonl", 50)
    expected = contents(encode_source(source, encoder, True, 1))
    monkeypatch.setenv("LORY_CACHE", str(tmp_path / "sums.jsonl" / "cache"))
    assert contents(encode_source(source, encoder, True, 1)) == expected
    assert "cannot be written to, so encoded data are not kept; name another folder in LORY_CACHE" in caplog.text


def test_a_cache_that_may_only_be_read_is_read(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    source = write_sums(tmp_path / "sums.jsonl", 50)
    expected = contents(encode_source(source, encoder, True, 1))
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(cache, "encode_all", lambda *_: pytest.fail("it was encoded again"))
    assert contents(encode_source(source, encoder, True, 1)) == expected


def test_runs_side_by_side_encode_once(
    tmp_path: Path, chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_sums(tmp_path / "sums.jsonl", 50)
    calls, encode_all = [], cache.encode_all

    def note(*given: Any) -> None:
        calls.append(given)
        time.sleep(0.2)
        encode_all(*given)

    monkeypatch.setattr(cache, "encode_all", note)
    encoders = [Encoder(*chat_tokenizer("chatml"), 512) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda encoder: encode_source(source, encoder, True, 1), encoders))
    assert len(calls) == 1
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])


def test_what_another_run_is_writing_stays_and_what_a_killed_one_left_goes(
    tmp_path: Path, encoder: Encoder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, age in (("running", 60), ("killed", 3 * 24 * 3600)):
        folder = own_cache / f".{name}.tmp"
        folder.mkdir(parents=True)
        (folder / SAMPLES).write_bytes(b"half")
        os.utime(folder, (time.time() - age,) * 2)
    monkeypatch.setattr(cache, "_MOST_BYTES", 1)
    encode_source(write_sums(tmp_path / "sums.jsonl", 20), encoder, True, 1)
    assert [folder.name for folder in own_cache.iterdir() if folder.name.startswith(".")] == [".running.tmp"]


def test_processes_leave_ctrl_c_to_the_one_that_waits(encoder: Encoder) -> None:
    with workers._Encoders(encoder, 2) as encoders:
        encoders.submit([]).result()
        assert encoders.pool is not None
        assert encoders.pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def test_a_source_without_a_sample_is_found_again(
    tmp_path: Path, chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, short = write_sums(tmp_path / "sums.jsonl", 20), Encoder(*chat_tokenizer("chatml"), 8)
    assert len(encode_source(source, short, True, 1)) == 0
    monkeypatch.setattr(cache, "encode_all", lambda *_: pytest.fail("it was encoded again"))
    assert len(encode_source(source, short, True, 1)) == 0


def test_processes_end_with_the_one_that_started_them() -> None:
    script = (
        "import time, types\n"
        "from lory.data.encoding.workers import _Encoders\n"
        "encoders = _Encoders(types.SimpleNamespace(reader=None), 2)\n"
        "for _ in range(2):\n"
        "    encoders.submit([])\n"
        "encoders.pool.submit(time.sleep, 0).result()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children()
        process.kill()
    assert children
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive
