"""Beside loralib 0.1.2, for all that works there: the same parameters, outputs, gradients and state dicts."""

from __future__ import annotations

import random
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import lory.lora as lora

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def _linear(draw: random.Random) -> tuple[str, dict[str, Any]]:
    arguments = {
        "in_features": draw.randint(1, 33),
        "out_features": draw.randint(1, 33),
        "r": draw.choice([0, 1, 3, 8]),
        "lora_alpha": draw.choice([1, 16, 2.5]),
        "lora_dropout": draw.choice([0.0, 0.3]),
        "fan_in_fan_out": draw.random() < 0.5,
        "bias": draw.random() < 0.7,
    }
    return "Linear", arguments


def _merged_linear(draw: random.Random) -> tuple[str, dict[str, Any]]:
    _, arguments = _linear(draw)
    slices = draw.randint(1, 4)
    enable = [draw.random() < 0.6 for _ in range(slices)]
    enable[draw.randrange(slices)] = True  # loralib breaks without one
    arguments.update(enable_lora=enable, out_features=slices * draw.randint(1, 9))
    return "MergedLinear", arguments


def _embedding(draw: random.Random) -> tuple[str, dict[str, Any]]:
    arguments = {
        "num_embeddings": draw.randint(3, 40),
        "embedding_dim": draw.randint(1, 33),
        "r": draw.choice([0, 1, 3, 8]),
        "lora_alpha": draw.choice([1, 16, 2.5]),
        "padding_idx": draw.choice([None, 1]),
        "scale_grad_by_freq": draw.random() < 0.5,
    }
    return "Embedding", arguments


def _conv(draw: random.Random) -> tuple[str, dict[str, Any]]:
    groups, dimensions = draw.choice([1, 2]), draw.choice([1, 2, 2, 2, 3])
    arguments = {
        "in_channels": groups * draw.randint(1, 5),
        "out_channels": groups * draw.randint(1, 5),
        "kernel_size": draw.randint(1, 3) if dimensions == 2 else 1,
        "r": draw.choice([0, 1, 3]),
        "lora_alpha": draw.choice([1, 16]),
        "groups": groups,
        "stride": draw.choice([1, 2]),
        "padding": draw.randint(0, 2),
        "padding_mode": draw.choice(["zeros", "circular"]),
        "dilation": draw.choice([1, 2]),
        "bias": draw.random() < 0.7,
    }
    return f"Conv{dimensions}d", arguments


def _make_input(name: str, arguments: dict[str, Any], draw: random.Random, dtype: torch.dtype) -> Tensor:
    lead = [draw.randint(1, 5) for _ in range(draw.randint(1, 2))]
    if name == "Embedding":
        return torch.randint(arguments["num_embeddings"], lead)
    if name.startswith("Conv"):
        return torch.randn(2, arguments["in_channels"], *[draw.randint(6, 9)] * int(name[4]), dtype=dtype)
    return torch.randn(*lead, arguments["in_features"], dtype=dtype)


def _perturb(layers: tuple[nn.Module, nn.Module]) -> None:
    """Give both layers the same adapters, none of them zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in layers[0].named_parameters():
            if "lora_" in name:
                parameter.normal_()
                layers[1].get_parameter(name).copy_(parameter)


def _run(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(5)
    y = layer(x)
    if y.requires_grad:
        y.square().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **found, **({"x": x.grad} if x.grad is not None else {})}


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() if expected.numel() else torch.zeros(())
        assert error <= TOLERANCE[dtype] * max(expected.abs().max().item(), 1.0), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("draw_case", [_linear, _merged_linear, _embedding, _conv])
@pytest.mark.parametrize("seed", range(25))
def test_same_seed_gives_the_same_layer(draw_case: Any, seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    name, arguments = draw_case(draw)
    layers = []
    for library in (lora, loralib):
        torch.manual_seed(seed)
        layers.append(getattr(library, name)(**arguments, dtype=dtype))
        after = torch.rand(3)  # and leaves the generator where loralib does
        layers[-1].after = after
    ours, theirs = layers
    assert torch.equal(ours.after, theirs.after)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]

    _perturb((ours, theirs))
    x = _make_input(name, arguments, draw, dtype)
    _assert_equal(_run(ours, x), _run(theirs, x), dtype)
    ours.eval()
    theirs.eval()
    _assert_equal(_run(ours, x), _run(theirs, x), dtype)
    with torch.no_grad():  # only now ours is merged too
        _assert_equal({"y": ours(x)}, {"y": theirs(x)}, dtype)
    ours.train()
    theirs.train()
    _assert_equal(_run(ours, x), _run(theirs, x), dtype)


def _model(library: Any) -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": library.Embedding(11, 8, r=2),
            "attention": library.MergedLinear(8, 24, r=2, enable_lora=[True, False, True]),
            "transposed": library.Linear(8, 5, r=2, fan_in_fan_out=True),
            "conv": library.Conv2d(3, 4, 3, r=2),
            "plain": nn.Linear(3, 3),
        }
    )


@pytest.mark.parametrize(("source", "target"), [(lora, loralib), (loralib, lora)])
def test_state_dicts_load_in_both_directions(source: Any, target: Any) -> None:
    model, other = _model(source), _model(target)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("source", "target"), [(lora, loralib), (loralib, lora)])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_base_first_and_adapter_second_also_loads(source: Any, target: Any, bias: Any) -> None:
    model, other = _model(source), _model(target)
    everything = model.state_dict()
    adapter = source.lora_state_dict(model, bias=bias)
    missing = other.load_state_dict({k: v for k, v in everything.items() if k not in adapter}, strict=False)
    assert not missing.unexpected_keys
    assert not other.load_state_dict(adapter, strict=False).unexpected_keys
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in everything.items())


@pytest.mark.parametrize("bias", ["none", "all"])
def test_marking_and_adapter_state_dict_mean_the_same_parameters(bias: Any) -> None:
    ours, theirs = _model(lora), _model(loralib)
    lora.mark_only_lora_as_trainable(ours, bias=bias)
    loralib.mark_only_lora_as_trainable(theirs, bias=bias)
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    assert list(lora.lora_state_dict(ours, bias=bias)) == list(loralib.lora_state_dict(theirs, bias=bias))
