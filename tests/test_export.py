"""`export.merge`: what is written answers like base plus adapter, or is not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lory import export
from lory.adapters.files import load_adapter
from lory.assistant import load
from lory.generate import GenerationOptions
from lory.models.resolve import resolve
from lory.runtime import LoryError, UsageError
from lory.training.config import Config
from lory.training.run import prepare

IDS = torch.tensor([[1, 5, 99, 300, 2, 17, 8]])
OPTIONS = GenerationOptions(max_new_tokens=31)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def load_plain(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def expected(tiny_model: Path, tiny_adapter: Path) -> torch.Tensor:
    """The logits of base plus adapter, by PEFT."""
    return logits(PeftModel.from_pretrained(load_plain(tiny_model), tiny_adapter).eval())


@pytest.fixture(scope="module")
def merged(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> export.Merged:
    """The tiny adapter, merged; do not write into its folder."""
    return export.merge(tiny_adapter, tmp_path_factory.mktemp("merged") / "model")


def corrupt(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the merge end with `change(tensors, base)` done to what it wrote."""
    whole = export.merge_shards

    def merge_shards(base: Path, adapter: Path, out: Path, *rest: Any) -> Any:
        report = whole(base, adapter, out, *rest)
        tensors = load_file(out / "model.safetensors")
        change(tensors, base)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return report

    monkeypatch.setattr(export, "merge_shards", merge_shards)


def test_merged_is_the_same_as_unmerged(merged: export.Merged, expected: torch.Tensor, tiny_model: Path) -> None:
    model = load_plain(merged.folder)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(load_plain(tiny_model))).abs().max() > 1
    assert merged.difference < 1e-5
    assert merged.report.merged == 14  # 7 linear layers in each of 2 layers


def test_a_merged_model_answers_and_streams_as_its_adapter_does(merged: export.Merged, tiny_adapter: Path) -> None:
    together, apart = load(merged.folder, device="cpu"), load(tiny_adapter, device="cpu")
    assert together.chat("Who are you?", OPTIONS) == apart.chat("Who are you?", OPTIONS) != ""
    assert "".join(together.stream("Who are you?", OPTIONS)) == apart.chat("Who are you?", OPTIONS)


def test_a_merged_model_is_a_whole_folder_for_transformers(merged: export.Merged, tiny_model: Path) -> None:
    tokenizer, own = (AutoTokenizer.from_pretrained(folder) for folder in (merged.folder, tiny_model))
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer.get_vocab() == own.get_vocab()
    assert load_plain(merged.folder).generation_config.eos_token_id == 2
    assert not list(merged.folder.glob("adapter*"))


def test_a_merged_model_can_be_trained_on(merged: export.Merged, records: Path) -> None:
    resolved = resolve(merged.folder)
    assert resolved.adapter is None
    data = {"train": [{"path": str(records)}], "max_tokens": 96}
    prepared = prepare(Config.model_validate({"model": {"path": str(merged.folder)}, "data": data}))
    assert prepared.dataset.train


def test_progress_ends_with_all_tensors(tiny_adapter: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = export.merge(tiny_adapter, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, result.report.tensors) for done in range(1, result.report.tensors + 1)]


def test_a_sharded_merge_is_the_same_model(tiny_adapter: Path, tmp_path: Path, expected: torch.Tensor) -> None:
    result = export.merge(tiny_adapter, tmp_path / "out", max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == result.report.shards > 3
    torch.testing.assert_close(logits(load_plain(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_merge_in_half_precision_is_as_near_as_rounding_lets_it(
    dtype: torch.dtype, error: float, tiny_adapter: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    result = export.merge(tiny_adapter, tmp_path / "out", dtype)
    assert 1e-5 < result.difference < error
    model = load_plain(tmp_path / "out", "auto")
    assert model.dtype == dtype
    assert (logits(model.float()) - expected).abs().max() < error * expected.abs().max()


def test_the_report_is_what_json_prints(merged: export.Merged) -> None:
    report = json.loads(json.dumps(merged.to_dict()))
    assert set(report) == {"folder", "tensors", "merged", "shards", "bytes", "difference"}
    assert report["bytes"] == sum(t.nbytes for t in load_file(merged.folder / "model.safetensors").values())


# What is refused


def add_noise(tensors: dict[str, torch.Tensor], base: Path) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-2 * torch.randn(40, 24)


def lose_an_update(tensors: dict[str, torch.Tensor], base: Path) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    tensors[name] = load_file(base / "model.safetensors")[name]


def spoil_a_token_of_the_last_prompt(tensors: dict[str, torch.Tensor], base: Path) -> None:
    prompts = export._random_prompts(resolve(base), torch.device("cpu"))
    token = int(prompts[-1][0, -1])
    assert not any((prompt == token).any() for prompt in prompts[:-1])
    tensors["model.embed_tokens.weight"][token] = float("nan")


@pytest.mark.parametrize("change", [add_noise, lose_an_update, spoil_a_token_of_the_last_prompt])
def test_a_merge_that_answers_otherwise_is_not_kept(
    change: Any, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, change)
    with pytest.raises(LoryError, match=r"differs from base and adapter by .* was not kept") as raised:
        export.merge(tiny_adapter, tmp_path / "out")
    assert raised.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.merge(tiny_adapter, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError, match="exists already; choose another folder"):
            export.merge(tiny_adapter, out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_empty_folder_is_filled(tiny_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export.merge(tiny_adapter, out)
    assert (out / "model.safetensors").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("device", ["bad", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(tiny_adapter: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(UsageError, match=f"The device '{device}' cannot be used here"):
        export.merge(tiny_adapter, tmp_path / "out", device=device)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_an_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="carries no adapter, so there is nothing to merge"):
        export.merge(tiny_model, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, folder)
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.9"): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UsageError, match=r"layers\.9"):
        export.merge(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_the_comparison_is_with_base_and_adapter(tiny_adapter: Path, tiny_model: Path) -> None:
    with pytest.raises(LoryError, match="differs from base and adapter"):
        export.compare(resolve(tiny_adapter), tiny_adapter, tiny_model)
    model = load_plain(tiny_model)
    load_adapter(model, tiny_adapter)  # the adapter does change this model
    assert (logits(model) - logits(load_plain(tiny_model))).abs().max() > 1
