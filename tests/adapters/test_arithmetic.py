"""A weighted sum of adapters is the sum of their changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lory.adapters.arithmetic import combine
from lory.adapters.factors import read_adapter
from lory.runtime import UsageError

TARGETS = ["wte", "up", "down", "conv"]


def make_net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"wte": nn.Embedding(9, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "conv": nn.Conv2d(3, 4, 3)}
    )


def make_adapter(folder: Path, seed: int, targets: list[str] = TARGETS, **options: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": targets, "init_lora_weights": False} | options
    peft.get_peft_model(make_net(), peft.LoraConfig(**settings)).save_pretrained(folder)
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight."""
    net = make_net()
    peft.PeftModel.from_pretrained(net, folder)
    layers = {name: module for name, module in net.named_children() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def test_cat_is_the_weighted_sum_for_any_ranks_alphas_and_layers(tmp_path: Path) -> None:
    parts = [
        (make_adapter(tmp_path / "a", 1), 0.7),
        (make_adapter(tmp_path / "b", 2, ["up", "conv"], r=5, lora_alpha=2, alpha_pattern={"up": 9}), -1.3),
        (make_adapter(tmp_path / "c", 3, ["wte", "down"], r=2, use_rslora=True, rank_pattern={"down": 4}), 2.0),
    ]
    combine(parts, tmp_path / "sum")
    found = deltas(tmp_path / "sum")
    assert found.keys() == set(TARGETS)
    for name, delta in found.items():
        expected = sum(weight * deltas(folder)[name] for folder, weight in parts if name in deltas(folder))
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["cat", "linear"])
def test_the_result_is_pefts(tmp_path: Path, mode: str) -> None:
    targets = ["wte", "up", "down"]
    parts = [(make_adapter(tmp_path / "a", 1, targets), 0.7), (make_adapter(tmp_path / "b", 2, targets), -0.4)]
    combine(parts, tmp_path / "sum", mode=mode)
    net = make_net()
    both = peft.PeftModel.from_pretrained(net, tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", "b")
    both.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", combination_type=mode)
    for name, delta in deltas(tmp_path / "sum").items():
        torch.testing.assert_close(delta, net[name].get_delta_weight("sum"), rtol=1e-5, atol=1e-5)


def test_ranks_add_up(tmp_path: Path) -> None:
    parts = [(make_adapter(tmp_path / "a", 1, ["up"]), 1.0), (make_adapter(tmp_path / "b", 2, r=4), 1.0)]
    combine(parts, tmp_path / "sum")
    ranks = {name: layer.rank for name, layer in read_adapter(tmp_path / "sum").layers.items()}
    assert ranks == {"wte": 4, "up": 7, "down": 4, "conv": 4}


def test_even_gives_all_layers_one_rank_and_alpha_and_the_same_change(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", 1, r=2, rank_pattern={"up": 5}, alpha_pattern={"down": 3}, use_rslora=True)
    combine([(folder, 1.0)], tmp_path / "even", even=True)
    layers = read_adapter(tmp_path / "even").layers.values()
    assert {(layer.rank, layer.alpha) for layer in layers} == {(5, 5)}
    for name, delta in deltas(tmp_path / "even").items():
        torch.testing.assert_close(delta, deltas(folder)[name], rtol=1e-5, atol=1e-6)


def test_one_adapter_of_weight_one_keeps_its_bits(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", 1)
    combine([(folder, 1.0)], tmp_path / "same")
    before, after = read_adapter(folder), read_adapter(tmp_path / "same")
    for name, layer in before.layers.items():
        assert torch.equal(layer.lora_A, after.layers[name].lora_A)
        assert torch.equal(layer.lora_B, after.layers[name].lora_B)
        assert layer.scaling == after.layers[name].scaling


def test_sixteen_bits_are_not_rounded_again(tmp_path: Path) -> None:
    net = make_net().to(torch.bfloat16)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"], init_lora_weights=False)
    peft.get_peft_model(net, config, autocast_adapter_dtype=False).save_pretrained(tmp_path / "a")
    before = read_adapter(tmp_path / "a").layers["up"]
    combine([(tmp_path / "a", 0.3)], tmp_path / "out")
    after = read_adapter(tmp_path / "out").layers["up"]
    assert before.lora_B.dtype == torch.bfloat16
    torch.testing.assert_close(after.lora_B, before.lora_B.float() * 0.5, rtol=1e-6, atol=0)


def test_what_is_no_change_is_added_only_where_it_is_the_same(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "a", 1, ["up"], modules_to_save=["down"])
    other = make_adapter(tmp_path / "b", 1, ["up"])
    with pytest.raises(UsageError, match=r"Only one of .* brings 'down\."):
        combine([(one, 1.0), (other, 1.0)], tmp_path / "sum")
    combine([(one, 0.5), (one, 0.5)], tmp_path / "sum")
    assert read_adapter(tmp_path / "sum").modules_to_save == ("down",)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_that_means_nothing_is_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(UsageError, match="weight"):
        combine([(tmp_path / "a", weight)], tmp_path / "sum")


def test_linear_wants_equal_ranks(tmp_path: Path) -> None:
    parts = [(make_adapter(tmp_path / "a", 1), 1.0), (make_adapter(tmp_path / "b", 2, r=4), 1.0)]
    with pytest.raises(UsageError, match=r"ranks \[3, 4\]; mode linear wants equal ones"):
        combine(parts, tmp_path / "sum", mode="linear")
    assert not (tmp_path / "sum").exists()


def test_adapters_of_different_models_are_refused(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "a", 1, ["up"])
    net = nn.ModuleDict({"up": nn.Linear(6, 10)})
    peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=["up"])).save_pretrained(tmp_path / "b")
    with pytest.raises(UsageError, match="different shapes for 'up'"):
        combine([(one, 1.0), (tmp_path / "b", 1.0)], tmp_path / "sum")
