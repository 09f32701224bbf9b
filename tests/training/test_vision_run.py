"""Runs on images, from config to a merged model that sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.vision_models import draw

from lory.assistant import load
from lory.config import build
from lory.data.vision.reader import Resizing
from lory.export import merge
from lory.generate import GenerationOptions
from lory.runtime import UsageError
from lory.training.config import Config
from lory.training.preview import estimate_memory, show_sample
from lory.training.run import prepare, train

EIGHT = GenerationOptions(max_new_tokens=8)


@pytest.fixture
def seeing_run(vision_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of a run of 6 steps on 9 records with images and 3 without."""
    monkeypatch.setattr("lory.training.run.plot_runs", lambda *_: [])
    lines = []
    for number in range(12):
        seen = number % 4 != 3
        content = "<image>What is it?" if seen else f"Is {number} odd?"
        answer = {"role": "assistant", "content": f"It is number {number}."}
        lines.append({"messages": [{"role": "user", "content": content}, answer]})
        if seen:
            draw(number, 12 + 2 * number, 24).save(tmp_path / f"{number}.png")
            lines[-1]["images"] = [f"{number}.png"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": {"path": str(vision_model("qwen2_vl"))},
        "adapter": {"rank": 3, "dropout": 0.1},
        "data": {"train": [{"path": str(tmp_path / "data.jsonl")}], "max_tokens": 128, "max_pixels": 512},
        "train": {"epochs": 3, "batch_size": 2, "learning_rate": 1e-2, "save_every_steps": 2},
        "samples": {"prompts": ["Who are you?"], "max_new_tokens": 3},
        "output": str(tmp_path / "runs"),
    }


def read_losses(run: Path) -> list[float]:
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "learning_rate" in entry]


def test_a_run_learns_is_resumed_is_merged_and_answers_as_it_did(seeing_run: dict[str, Any], tmp_path: Path) -> None:
    run = train(seeing_run).folder
    losses = read_losses(run)
    assert losses[-1] < losses[0]
    report = json.loads((run / "data.json").read_text())
    assert report["sources"][0]["images"] == 9

    assistant = load(run, device="cpu")
    assert assistant.reader is not None
    assert assistant.reader.resizing == Resizing(max_pixels=512)
    question = [{"role": "user", "content": [{"type": "image", "image": draw(1)}, {"type": "text", "text": "What?"}]}]
    expected = assistant.answer_ids(question, EIGHT)
    assert expected != load(seeing_run["model"]["path"], device="cpu").answer_ids(question, EIGHT)
    merge(run, tmp_path / "merged")
    merged = load(tmp_path / "merged", device="cpu")
    assert merged.prompt(question).ids == assistant.prompt(question).ids
    assert merged.answer_ids(question, EIGHT) == expected

    whole = load_file(run / "last" / "adapter_model.safetensors")
    train(str(run), resume="checkpoint-4")
    resumed = load_file(run / "last" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_whole_model_is_trained_and_saved_with_its_processor(seeing_run: dict[str, Any]) -> None:
    changes = {"adapter": {"type": "full"}, "model": seeing_run["model"] | {"dtype": "bfloat16"}}
    run = train(seeing_run | changes, ["train.epochs=1"]).folder
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (seeing_run["model"]["path"], run / "last")
    )
    changed = {name for name, value in after.items() if not torch.equal(value, before[name].to(value.dtype))}
    assert any("visual.blocks" in name for name in changed)
    assert any("language_model.layers" in name or "model.layers" in name for name in changed)
    assert load(run / "last", device="cpu").sees_images


def test_a_part_that_is_frozen_stays_as_it_is(seeing_run: dict[str, Any]) -> None:
    changes = {"adapter": {"type": "full", "freeze_vision": True, "freeze_projector": True}}
    run = train(seeing_run | changes, ["train.epochs=1"]).folder
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (seeing_run["model"]["path"], run / "last")
    )
    tower = [name for name in after if "visual" in name]
    assert tower
    assert all(torch.equal(before[name], after[name]) for name in tower)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.unlikelihood.sequence_rate=0.5", "does not go with images"),
        ("loss.embedding_noise=5", "does not go with images"),
        ("adapter={type: prompt}", "does not go with a model that sees"),
    ],
)
def test_what_does_not_go_with_images_is_refused(seeing_run: dict[str, Any], override: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        train(seeing_run, [override])


def test_a_look_before_training_counts_image_tokens(seeing_run: dict[str, Any]) -> None:
    prepared = prepare(build(Config, seeing_run, "config"))
    sample = prepared.dataset.train[2]
    assert prepared.reader is not None
    count = sample.input_ids.count(prepared.reader.token_id)
    assert count >= 4
    assert f"<|image_pad|>×{count}" in show_sample(sample, prepared.tokenizer).plain
    assert estimate_memory(prepared, [[0]])["total"] > 0
