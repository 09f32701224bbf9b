"""`lory convert` finds the way from what it is given, and refuses options that mean nothing there."""

from __future__ import annotations

from pathlib import Path

import loralib
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lory.adapters.convert import Options, convert
from lory.adapters.factors import read_adapter
from lory.runtime import UsageError


@pytest.fixture
def loralib_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": loralib.MergedLinear(4, 9, r=2, lora_alpha=6, enable_lora=[True, False, True])})
    nn.init.normal_(net["attn"].lora_B)
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in loralib.lora_state_dict(net).items()}, "step": 7},
               tmp_path / "adapter.pt")  # fmt: skip
    return tmp_path / "adapter.pt"


@pytest.fixture
def adapter(tmp_path: Path, loralib_file: Path) -> Path:
    convert([str(loralib_file)], tmp_path / "peft", Options(alpha=6, merged=["attn=1,0,1"]))
    return tmp_path / "peft"


def test_a_loralib_file_becomes_an_adapter_folder(tmp_path: Path, loralib_file: Path) -> None:
    options = Options(alpha=6, merged=["attn=1,0,1"], rename=["^attn=h.0.attn"], base="owner/model")
    result = convert([str(loralib_file)], tmp_path / "out", options)
    made = read_adapter(tmp_path / "out")
    assert (result.layers, result.ranks, result.alpha, result.left_out) == (1, (4,), 12, ("step",))
    assert list(made.layers) == ["h.0.attn"]
    assert made.base == "owner/model"


def test_an_adapter_folder_becomes_a_loralib_file_again(tmp_path: Path, loralib_file: Path, adapter: Path) -> None:
    options = Options(merged=["attn=1,0,1"], rename=["^=module."])
    result = convert([str(adapter)], tmp_path / "back.safetensors", options)
    before = torch.load(loralib_file, weights_only=True)["model_state_dict"]
    after = load_file(tmp_path / "back.safetensors")
    assert result.alpha == 6
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapter_folders_are_added_up_with_their_weights(tmp_path: Path, adapter: Path) -> None:
    result = convert([f"{adapter}=0.5", str(adapter)], tmp_path / "out", Options())
    one, both = read_adapter(adapter).layers["attn"], read_adapter(tmp_path / "out").layers["attn"]
    assert result.ranks == (8,)
    delta = one.lora_B @ one.lora_A * one.scaling
    torch.testing.assert_close(both.lora_B @ both.lora_A * both.scaling, 1.5 * delta)


def test_a_checkpoint_with_lora_weights_becomes_an_adapter_folder(tmp_path: Path) -> None:
    name = "llm.base_model.model.q"
    state = {f"{name}.lora_A.default.weight": torch.ones(64, 3), f"{name}.lora_B.default.weight": torch.ones(4, 64)}
    torch.save(state, tmp_path / "iter_5.pth")
    result = convert([str(tmp_path / "iter_5.pth")], tmp_path / "out", Options(alpha=4))
    assert result.ranks == (64,)
    assert "--max-lora-rank 64" in result.notes[0]


def test_a_checkpoint_with_a_whole_model_becomes_a_model_folder(tmp_path: Path, tiny_model: Path) -> None:
    state = load_file(tiny_model / "model.safetensors")
    torch.save(state, tmp_path / "model.pth")
    asked = []

    def find(name: str) -> Path:
        asked.append(name)
        return tiny_model

    result = convert([str(tmp_path / "model.pth")], tmp_path / "out", Options(base="tiny", fp32=True), find)
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert asked == ["tiny"]
    assert result.files == 1
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(), "does not hold the LoRA alpha"),
        (Options(alpha=-1, merged=["attn=1,0,1"]), "alpha is -1"),
        (Options(alpha=6, merged=["attn=1,0,1"], fp32=True), "--fp32 means nothing"),
        (Options(alpha=6, merged=["attn=1,0,1"], max_shard_bytes=5), "--max-shard-size means nothing"),
        (Options(alpha=6, merged=["attn"]), "NAME=VALUE is expected"),
        (Options(alpha=6, conv=["attn=axb"]), "3, 3x3 or 3x3x3"),
    ],
)
def test_options_that_lack_or_mean_nothing_are_refused(
    tmp_path: Path, loralib_file: Path, options: Options, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        convert([str(loralib_file)], tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_sources_that_make_no_sense_are_refused(tmp_path: Path, loralib_file: Path, adapter: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for sources, out, message in (
        ([str(tmp_path / "absent")], "out", "absent' does not exist"),
        ([f"{adapter}=much"], "out", "no FOLDER=WEIGHT"),
        ([str(adapter), str(loralib_file)], "out", "only adapter folders can be added up"),
        ([f"{adapter}=2"], "out.pt", "add them up into a folder first"),
        ([str(loralib_file)], "out.pt", "only an adapter folder"),
        ([str(adapter)], "full", "exists already"),
        ([str(adapter)], "adapter.pt", "exists already"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(sources, tmp_path / out, Options())


def test_a_whole_model_needs_a_base(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="--base"):
        convert([str(tmp_path / "x.pth")], tmp_path / "out", Options())
