"""`lory data`: each command, for a person and as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.data.chat_api import serve
from typer.testing import CliRunner

from lory.cli import build_app
from lory.data.making.identity import identity_conversations
from lory.data.records.formats import FORMATS
from lory.data.sources.read import SourceConfig, read_source
from lory.runtime import UsageError

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`lory data ...` in an empty folder; gives standard output, and raises what the command raises."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(build_app(), ["data", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


@pytest.fixture
def config(tiny_model: Path, records: Path, tmp_path: Path) -> Path:
    """24 sums and the bundled identity."""
    chat = [{"role": "user", "content": "Long?"}, {"role": "assistant", "content": "word " * 60, "weight": 0.5}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": chat, "source": "web"}) + "\n")
    train: list[Any] = [str(records), str(tmp_path / "long.jsonl")]
    data = {"train": train, "max_tokens": 400, "cache": False, "eval_fraction": 0.2}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": str(tiny_model)}, "data": data}))
    return path


def test_stats_are_printed_and_drawn(run: Run, config: Path, tmp_path: Path) -> None:
    text = run("stats", config)
    assert text.splitlines()[0] == "sums.jsonl"
    for part in ("24 records", "all sources", "█", "languages: en", "exact duplicates: 0", "longest: ", " full; "):
        assert part in text
    assert text.splitlines()[-1] == "picture: data-stats.png"
    assert (tmp_path / "data-stats.png").exists()


def test_stats_as_json_have_everything(run: Run, config: Path, tmp_path: Path) -> None:
    stats = json.loads(run("stats", config, "--json", "--picture", tmp_path / "own.png"))
    assert stats["picture"] == str(tmp_path / "own.png")
    assert [source["name"] for source in stats["sources"]] == ["sums.jsonl", "long.jsonl"]
    assert stats["all"]["read"] == 25
    assert 0 < stats["packing_efficiency"] <= 1
    assert stats["steps"] == 3 * stats["steps_per_epoch"]
    assert sum(source["tokens"] for source in stats["sources"]) == stats["all"]["tokens"]


def test_stats_of_a_stream_say_that_they_are_a_part(run: Run, config: Path) -> None:
    changes = ("data.streaming=true", "data.eval_fraction=0", "data.window_samples=5", "train.max_steps=2")
    assert "statistics of the first window" in run("stats", config, *changes)
    stats = json.loads(run("stats", config, "--json", *changes))
    assert stats["streamed"] is True
    assert stats["all"]["conversations"]["train"] == 5


def test_show_explains_the_sources_and_prints_messages_samples_and_tokens(run: Run, config: Path) -> None:
    text = run("show", config, "-n", 1)
    assert "sums.jsonl: read as messages; keys: messages (list)" in text
    assert "  not used: source" in text
    assert f"assistant (weight 0.5): {'word ' * 60}".strip() in text
    assert "⟧×0.5" in text
    assert text.count("(in ⟦ ⟧)") == 2
    assert "│<|im_start|>│" in text or "<|im_start|>│" in text


def test_show_shortens_messages_when_told(run: Run, config: Path) -> None:
    long = f"assistant (weight 0.5): {('word ' * 60)[:199]}…"
    assert long in run("show", config, "--short")
    assert long not in run("show", config)


def test_show_as_json_has_the_same(run: Run, config: Path) -> None:
    shown = json.loads(run("show", config, "-n", 1, "--json"))
    assert [source["format"] for source in shown["sources"]] == ["messages", "messages"]
    assert shown["sources"][1]["unused"] == ["source"]
    _, long = shown["samples"]
    assert long["messages"][1]["weight"] == 0.5
    assert long["where"].endswith("long.jsonl line 1")
    assert {weight for weight in long["weights"] if weight} == {0.5}
    assert "".join(long["tokens"]) == long["text"]


def test_data_sets_are_listed_by_pattern(run: Run) -> None:
    everything = json.loads(run("list", "--json"))
    found = json.loads(run("list", "alpaca", "--json"))
    assert 0 < len(found) < len(everything)
    assert run("list", "alpaca").startswith(found[0]["name"])
    with pytest.raises(UsageError, match="has 'no-such-thing'"):
        run("list", "no-such-thing")


def test_formats_are_listed_with_their_keys(run: Run) -> None:
    found = json.loads(run("formats", "--json"))
    assert list(found) == list(FORMATS)
    assert found["alpaca"]["required"] == ["instruction", "output"]
    assert "\nsharegpt: conversations\n" in run("formats")


def test_the_identity_set_is_written_once(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "me.jsonl"
    told = json.loads(run("identity", "--name", "Polly", "--author", "Ann", "--out", path, "--json"))
    expected = identity_conversations("Polly", "Ann")
    assert told == {"path": str(path), "records": len(expected)}
    assert read_source(SourceConfig(path=str(path))).conversations == expected
    with pytest.raises(UsageError, match=r"me\.jsonl exists already"):
        run("identity", "--name", "Polly", "--author", "Ann", "--out", path)


def test_the_identity_set_goes_to_standard_output(run: Run) -> None:
    lines = run("identity", "--name", "Polly", "--author", "Ann").splitlines()
    records = [json.loads(line) for line in lines]
    assert records == json.loads(run("identity", "--name", "Polly", "--author", "Ann", "--json"))["records"]


def test_generate_takes_its_key_from_the_environment(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    with serve() as api:
        api.key = "sk-mine"
        command = ("generate", "--api", api.url, "--model", "m", "--seeds", "general", "--key-env", "MY_KEY", "-n", 2)
        with pytest.raises(UsageError, match="environment variable MY_KEY is not set"):
            run(*command, "--out", tmp_path / "a.jsonl")
        monkeypatch.setenv("MY_KEY", "sk-mine")
        text = run(*command, "--out", tmp_path / "a.jsonl")
        assert text.startswith(f"{tmp_path / 'a.jsonl'}: 2 records; 3 calls, 30 tokens in and 15 out")
        told = json.loads(run(*command, "--out", tmp_path / "a.jsonl", "--json"))
    assert (told["accepted"], told["asked"], told["replayed"]) == (2, 0, 3)


def test_generate_says_what_is_wrong_with_its_limits(run: Run, tmp_path: Path) -> None:
    command = ("generate", "--api", "http://127.0.0.1:9/v1", "--model", "m", "--seeds", "general")
    with pytest.raises(UsageError, match="--min-words 9 is above --max-words 3"):
        run(*command, "--out", tmp_path / "a.jsonl", "--min-words", 9, "--max-words", 3)
    with pytest.raises(UsageError, match="missing is no folder"):
        run(*command, "--out", tmp_path / "missing" / "a.jsonl")
