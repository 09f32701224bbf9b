"""A stream gives the steps that the whole set gives, window by window, and a resumed run finds its place in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lory.runtime import UsageError
from lory.training import feed
from lory.training.monitor import read_log
from lory.training.run import train


def write_sums(path: Path, count: int, offset: int = 0) -> str:
    lines = [{"query": f"{offset + n} + {n}?", "response": str(offset + 2 * n)} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


@pytest.fixture
def streamed(quick: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small run over two streamed files, in windows of 20 of their 57 records: 5 steps each, and 4 in the last."""
    paths = [write_sums(tmp_path / "one.jsonl", 31), write_sums(tmp_path / "two.jsonl", 26, 100)]
    quick["data"] |= {"train": [{"path": path} for path in paths], "streaming": True, "window_samples": 20}
    quick["train"] |= {"epochs": 2, "max_steps": 99, "log_every_steps": 1, "eval_every_steps": 99}
    return quick


def weights(run: Path) -> dict[str, list[float]]:
    tensors = load_file(run / "last" / "adapter_model.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def record_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    taken: list[tuple[int, ...]] = []
    make = feed.make_batch

    def note(*given: Any) -> Any:
        batch = make(*given)
        taken.append(tuple(batch.input_ids.flatten().tolist()))
        return batch

    monkeypatch.setattr(feed, "make_batch", note)
    return taken


def test_a_stream_of_one_window_is_the_set(streamed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    streamed["data"]["window_samples"] = 1000
    taken = record_batches(monkeypatch)
    first = weights(train(streamed).folder)
    as_stream = list(taken)
    taken.clear()
    whole = streamed | {"data": streamed["data"] | {"streaming": False}, "train": streamed["train"] | {"max_steps": 30}}
    # the schedule goes by the number of steps, which a stream does not know: 15 a pass
    streamed["train"]["max_steps"] = 30
    again = weights(train(streamed).folder)
    assert taken == as_stream
    taken.clear()
    assert weights(train(whole).folder) == again
    assert taken == as_stream
    assert first != again


def test_every_record_is_learnt_once_a_pass_and_the_run_ends_after_its_passes(
    streamed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    taken = record_batches(monkeypatch)
    streamed["train"] |= {"batch_size": 1, "accumulate": 1, "max_steps": 999}
    result = train(streamed)
    assert result.steps == 2 * 57
    assert len(set(taken)) == 57
    assert all(taken.count(batch) == 2 for batch in taken)
    assert taken[:57] != taken[57:]


@pytest.mark.parametrize("mixing", ["concat", "first_exhausted"])
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(streamed: dict[str, Any], mixing: str) -> None:
    streamed["data"] |= {"mixing": mixing}
    if mixing == "first_exhausted":
        streamed["data"]["train"][0]["weight"] = 3.0
    streamed["train"] |= {"max_steps": 17, "keep_checkpoints": 99}
    run = train(streamed).folder
    expected, losses = weights(run), [line["loss"] for line in read_log(run) if "grad_norm" in line]
    assert len(losses) == 17
    for step in (3, 6, 12, 15):
        train(run, resume=f"checkpoint-{step}")
        assert weights(run) == expected
        assert [line["loss"] for line in read_log(run) if "grad_norm" in line] == losses


def test_weights_draw_from_the_sources_until_one_has_no_more(
    streamed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed["data"] |= {"mixing": "first_exhausted"}
    streamed["data"]["train"][0]["weight"] = 3.0
    streamed["train"] |= {"epochs": 1, "batch_size": 1, "accumulate": 1}
    taken = record_batches(monkeypatch)
    result = train(streamed)
    # of three to one, until the first has given its 31
    assert 31 + 5 <= result.steps <= 31 + 18
    assert len(set(taken)) == result.steps


def test_held_out_data_are_a_set_of_their_own(streamed: dict[str, Any], tmp_path: Path) -> None:
    streamed["data"]["eval"] = [{"path": write_sums(tmp_path / "eval.jsonl", 7, 500)}]
    streamed["train"] |= {"max_steps": 2}
    run = train(streamed).folder
    assert any("eval" in line for line in read_log(run))
    report = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert [source.get("streamed", False) for source in report["sources"]] == [True, True, False]


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("train", {"max_steps": None}, "data.streaming needs train.max_steps"),
        ("data", {"eval_fraction": 0.1}, "eval_fraction needs all data at once"),
        ("data", {"duplicates": "drop"}, "drop needs all data at once"),
        ("data", {"train": [{"path": "x.jsonl", "sample": 3}]}, "'x.jsonl' has a sample"),
        ("data", {"train": [{"path": "x.jsonl", "weight": 3}], "mixing": "all_exhausted"}, "all_exhausted needs"),
    ],
)
def test_what_needs_all_data_at_once_is_refused(
    streamed: dict[str, Any], section: str, values: dict[str, Any], sentence: str
) -> None:
    streamed[section] |= values
    with pytest.raises(UsageError, match=sentence):
        train(streamed)
