"""The demo, without its minutes of training: what it trains on, and what it says in the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lory.training import demo
from lory.training.config import Config, read_config
from lory.training.run import RunResult


def test_the_bundled_config_is_trained_under_the_given_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    result = RunResult(tmp_path, 9, 9, 1.0)
    monkeypatch.setattr(demo, "train", lambda config: seen.append(config) or result)
    assert demo.run_demo("Polly", "me", tmp_path / "runs") == result
    (config,), own = seen, read_config("assistant")[0]
    assert [(source.path, source.name, source.author) for source in config.data.train] == [
        ("identity", "Polly", "me"),
        ("general", None, None),
    ]
    assert config.output == str(tmp_path / "runs")
    assert (config.model, config.adapter, config.train) == (own.model, own.adapter, own.train)


def test_it_says_what_was_learnt_and_what_to_try(tmp_path: Path) -> None:
    evals = [(0, 2.5, 1.25), (50, 0.5, 1.0), (97, 0.125, 1.125)]
    lines: list[dict[str, object]] = [{"step": 1, "loss": 2.0}]
    for step, identity, general in evals:
        sources = {"identity": {"loss": identity}, "general": {"loss": general}}
        lines.append({"step": step, "eval": {"loss": 1.0, "sources": sources}})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chats = [(0, "Who are you?", "I am\nSmolLM"), (50, "Who are you?", "Pol"), (97, "Who are you?", "I'm Polly.")]
    samples = [{"step": step, "prompt": prompt, "answer": answer} for step, prompt, answer in chats]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    said = demo.describe_demo(tmp_path, Path("my runs"))
    assert "> Who are you?\n  before: I am SmolLM\n  after:  I'm Polly.\n" in said
    assert "  identity: 2.500 before, 0.125 after\n  general: 1.250 before, 1.125 after\n" in said
    assert f"{tmp_path}/plots/loss.png" in said
    assert "lory chat 'my runs'\n" in said
    assert "lory merge 'my runs' out/model\n" in said
    assert "lory train assistant.yaml" in said
