"""Models in FP8: what is rounded, what is not, where it is refused, and that the fused layers know it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.lora.fp8 import LinearFp8
from lory.models.attention import document_arguments, documents_apart
from lory.models.fp8 import check_fp8, hold_in_fp8
from lory.models.fused_body import fused_layers
from lory.runtime import UsageError

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LENGTHS = torch.tensor([3, 20, 9])


def prepare(random_model: Callable[..., Any], **settings: Any) -> Any:
    model = random_model("Llama", **SIZES)
    for parameter in model.parameters():
        parameter.data.mul_(0.3)
    attach_lora(model, AdapterConfig(**({"rank": 2} | settings)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def run_ordinarily(model: Any, ids: Tensor) -> Tensor:
    with documents_apart(model):
        states: Tensor = model.base_model(ids, use_cache=False, **document_arguments(LENGTHS, ids.device))[0]
    return states


def gradients(model: Any, states: Tensor) -> Tensor:
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
    learnt = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad((states * weight).sum(), learnt)])


def test_the_layers_of_the_body_are_rounded_and_the_head_is_not(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model, targets=["q_proj"])
    assert hold_in_fp8(model) == 14
    rounded = {path.rpartition(".")[2] for path, part in model.named_modules() if isinstance(part, LinearFp8)}
    assert rounded == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(model.lm_head) is nn.Linear


def test_what_is_trained_stays_as_it_is(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model, targets=["q_proj"], modules_to_save=["down_proj"])
    assert hold_in_fp8(model) == 12
    assert all(type(layer.mlp.down_proj) is nn.Linear for layer in model.model.layers)


def test_odd_sizes_stay_as_they_are_and_are_told(
    random_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model("Llama", **(SIZES | {"intermediate_size": 100})).requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        assert hold_in_fp8(model) == 8
    assert "6 linear layers are not held in FP8" in caplog.text
    with pytest.raises(UsageError, match="no linear layer is left"):
        hold_in_fp8(random_model("Llama").requires_grad_(False))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_fused_layers_give_what_the_models_own_give(random_model: Callable[..., Any], targets: Any) -> None:
    model = prepare(random_model, targets=targets)
    ids = torch.randint(3, 131, (1, int(LENGTHS.sum())), generator=torch.Generator().manual_seed(0))
    plain = run_ordinarily(model, ids)
    hold_in_fp8(model)
    fused, reason = fused_layers(model)
    assert fused is not None, reason
    found, expected = fused(ids, LENGTHS), run_ordinarily(model, ids)
    assert (found - expected).norm() < 1e-2 * expected.norm()
    assert 1e-4 < (expected - plain).norm() / plain.norm() < 0.1
    ours, theirs = gradients(model, found), gradients(model, expected)
    # a state at the border of two FP8 numbers falls to either side
    assert (ours - theirs).norm() < 3e-2 * theirs.norm()


def test_training_in_fp8_follows_training_in_full(random_model: Callable[..., Any]) -> None:
    ids = torch.randint(3, 131, (1, 24), generator=torch.Generator().manual_seed(0))
    drops = []
    for rounded in (False, True):
        model = prepare(random_model)
        if rounded:
            hold_in_fp8(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        drops.append(losses[0] - losses[-1])
    assert drops[0] > 0.2
    assert drops[1] == pytest.approx(drops[0], rel=0.1)


def test_a_device_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"Hopper\) or later, but the device is 'cpu'"):
        check_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old One")
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, known=capability: known)
        if capability >= (9, 0):
            check_fp8(torch.device("cuda"))
        else:
            with pytest.raises(UsageError, match=r"'Old One' has compute capability 8.9"):
                check_fp8(torch.device("cuda"))
