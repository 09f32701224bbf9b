"""Embedding beyond loralib."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lory.lora as lora

INDICES = torch.tensor([[0, 3, 3], [8, 1, 2]])


def _make(**arguments: Any) -> lora.Embedding:
    torch.manual_seed(0)
    layer = lora.Embedding(9, 4, r=2, **arguments)
    nn.init.normal_(layer.lora_A)
    return layer


def test_max_norm_limits_the_output_and_rewrites_nothing() -> None:
    layer = _make(max_norm=0.5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(INDICES)
    assert y.norm(dim=-1).max() <= 0.5 + 1e-6
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(INDICES), y)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_fresh_max_norm_layer_answers_like_torch() -> None:
    layer, base = lora.Embedding(9, 4, r=2, max_norm=1.0), nn.Embedding(9, 4, max_norm=1.0)
    base.load_state_dict({"weight": layer.weight.clone()})
    torch.testing.assert_close(layer(INDICES), base(INDICES))


def test_sparse_embeddings_learn_the_same_as_dense_ones() -> None:
    sparse, dense = _make(sparse=True), _make()
    for layer in (sparse, dense):
        layer(INDICES).square().sum().backward()
    torch.testing.assert_close(sparse.lora_A.grad, dense.lora_A.grad)
    torch.testing.assert_close(sparse.lora_B.grad, dense.lora_B.grad)
    torch.optim.SGD(sparse.parameters(), lr=0.1, weight_decay=0.1).step()


def test_padding_gets_no_gradient() -> None:
    layer = _make(padding_idx=3)
    layer(INDICES).square().sum().backward()
    assert not layer.lora_A.grad[:, 3].any()
    assert layer.lora_A.grad[:, 8].any()


def test_a_given_weight_is_kept() -> None:
    weight = torch.randn(9, 4)
    assert torch.equal(lora.Embedding.from_pretrained(weight.clone())(INDICES), weight[INDICES])
    layer = lora.Embedding(9, 4, r=2, _weight=weight.clone())
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(INDICES), weight[INDICES])
    assert layer.lora_B.abs().sum() > 0


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_gradients_are_the_derivatives(max_norm: float | None) -> None:
    layer = _make(max_norm=max_norm, dtype=torch.float64)

    def run(lora_A: torch.Tensor, lora_B: torch.Tensor) -> Any:
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (INDICES,))

    assert torch.autograd.gradcheck(run, (layer.lora_A, layer.lora_B))
