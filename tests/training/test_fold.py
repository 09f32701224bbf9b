"""Folding: equal samples of a step are computed once and count as often as they are there, which changes no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lory.training import feed
from lory.training.monitor import read_log
from lory.training.run import train

RECORDS = [
    {"query": "Who are you?", "response": "I am Lory, a parrot that does not parrot."},
    {"query": "Who made you?", "response": "The lory authors."},
    {"query": "What is 3 + 4?", "response": "7"},
]


def repeat(folder: Path, times: list[int]) -> str:
    lines = [json.dumps(record) for record, count in zip(RECORDS, times, strict=True) for _ in range(count)]
    path = folder / "repeated.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def run_both(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], list[int]]:
    """The folders of a run that folds and one that does not, and how many tokens each computed."""
    folders, computed = [], []
    quick["adapter"] = quick["adapter"] | {"dropout": 0.0}  # it would be drawn anew for each copy
    make = feed.make_batch
    for duplicates in ("keep", "fold"):
        tokens: list[int] = []

        def count(*given: Any, tokens: list[int] = tokens) -> Any:
            batch = make(*given)
            tokens.append(batch.tokens)
            return batch

        monkeypatch.setattr(feed, "make_batch", count)
        folders.append(train(quick | {"data": quick["data"] | {"duplicates": duplicates}}).folder)
        computed.append(sum(tokens))
    return folders, computed


def largest_difference(one: Path, other: Path) -> float:
    ours, theirs = (load_file(run / "last" / "adapter_model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("times", "share"), [([40, 40, 0], 0.2), ([30, 9, 1], 0.5)])
def test_the_loss_curve_and_the_adapter_stay_the_same(
    quick: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: bool,
    times: list[int],
    share: float,
) -> None:
    quick["data"] |= {"train": [{"path": repeat(tmp_path, times)}], "packing": packing, "max_tokens": 256}
    quick["train"] |= {"batch_size": 2 if packing else 8, "accumulate": 2, "log_every_steps": 1, "max_steps": 6}
    (kept, folded), (all_tokens, fewer) = run_both(quick, monkeypatch)
    losses = [[line["loss"] for line in read_log(run) if "grad_norm" in line] for run in (kept, folded)]
    assert len(losses[0]) > 2
    torch.testing.assert_close(*(torch.tensor(curve) for curve in losses), atol=1e-5, rtol=0)
    assert largest_difference(kept, folded) < 1e-5
    learnt = [[line["supervised_tokens"] for line in read_log(run) if "grad_norm" in line] for run in (kept, folded)]
    assert learnt[0] == learnt[1]
    assert fewer < share * all_tokens


def test_weights_of_messages_and_counts_multiply(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!", "weight": 0.5},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."},
    ]
    lines = [json.dumps({"messages": messages})] * 12 + [json.dumps({"messages": messages[2:]})] * 5
    (tmp_path / "weighted.jsonl").write_text("\n".join(lines), encoding="utf-8")
    quick["data"] |= {"train": [{"path": str(tmp_path / "weighted.jsonl")}]}
    quick["train"] |= {"log_every_steps": 1, "max_steps": 4}
    folders, _ = run_both(quick, monkeypatch)
    assert largest_difference(*folders) < 1e-5


def test_dropping_leaves_one_of_each(quick: dict[str, Any], tmp_path: Path) -> None:
    quick["data"] |= {"train": [{"path": repeat(tmp_path, [5, 4, 3])}], "duplicates": "drop", "packing": False}
    quick["train"] |= {"max_steps": 1}
    report = json.loads((train(quick).folder / "data.json").read_text(encoding="utf-8"))
    (source,) = report["sources"]
    assert (source["read"], source["kept"], source["dropped"]) == (12, 3, {"exact duplicate": 9})
    assert (report["rows"], report["duplicates"]) == (3, 9)
