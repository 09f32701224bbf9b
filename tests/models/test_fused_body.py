"""Fused layers are used for what they are known to compute, and the reason is told for all else."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.models.fused_body import fused_layers
from lory.models.kernels import Kernels


def adapt(model: Any, **settings: Any) -> Any:
    attach_lora(model, AdapterConfig(rank=2, **settings))
    return model


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "InternLM3"])
def test_the_llama_family_is_covered(random_model: Callable[..., Any], family: str) -> None:
    if family == "InternLM3" and not hasattr(transformers, "InternLM3Config"):
        pytest.skip("this transformers has no InternLM3")
    fused, reason = fused_layers(adapt(random_model(family)))
    assert fused is not None
    assert reason == ""


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Gemma2", {}, "layer 0 is not built like Llama's"),
        ("Gemma", {}, "layer 0 has an MLP that is not gated by silu"),
        ("Llama", {"hidden_act": "gelu"}, "layer 0 has an MLP that is not gated by silu"),
        ("Llama", {"attention_dropout": 0.1}, "layer 0 has attention dropout"),
        ("Granite", {"residual_multiplier": 0.5}, "GraniteForCausalLM computes something that the fused layers do not"),
        ("GPTNeoX", {}, "GPTNeoXForCausalLM is not built like Llama"),
        ("SmolLM3", {"no_rope_layers": [0, 1]}, "SmolLM3ForCausalLM computes something that the fused layers do not"),
    ],
)
def test_other_architectures_are_not(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any], reason: str
) -> None:
    assert fused_layers(adapt(random_model(family, **changes))) == (None, reason)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"type": "dora"}, "layer 0 has a 'q_proj' that is DoRA's"),
        ({"init": "pissa"}, "layer 0 has a 'q_proj' that is PiSSA's"),
        ({"modules_to_save": ["up_proj"], "targets": ["q_proj"]}, "layer 0 has a 'up_proj' that is trained in full"),
    ],
)
def test_other_adapters_are_not(random_model: Callable[..., Any], settings: dict[str, Any], reason: str) -> None:
    assert fused_layers(adapt(random_model("Llama"), **settings)) == (None, reason)


def train_norm(model: Any) -> None:
    model.base_model.layers[1].input_layernorm.weight.requires_grad = True


def train_bias(model: Any) -> None:
    model.base_model.layers[1].self_attn.k_proj.bias.requires_grad = True


def add_hook(model: Any) -> None:
    model.base_model.layers[1].mlp.register_forward_hook(lambda *_: None)


def add_prefix(model: Any) -> None:
    model.add_module("lory_prefix", nn.Identity())


def checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def widen(model: Any) -> None:
    model.double()


def mix_precisions(model: Any) -> None:
    model.base_model.norm.to(torch.float64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (train_norm, "layer 1 has a norm that is trained"),
        (train_bias, "layer 1 has a 'k_proj' that is trained in full"),
        (add_hook, "'model.layers.1.mlp' has a hook"),
        (add_prefix, "the model carries 'lory_prefix'"),
        (checkpoint, "gradient checkpointing is on"),
        (widen, "layer 0 has a norm that rounds to float32"),
        (mix_precisions, "the weights differ in precision or place"),
    ],
)
def test_changed_models_are_not(random_model: Callable[..., Any], change: Callable[[Any], None], reason: str) -> None:
    model = adapt(random_model("Qwen2"))
    change(model)
    assert fused_layers(model) == (None, reason)


def test_padded_rows_autocast_hooks_and_checkpointing_take_the_ordinary_path(random_model: Callable[..., Any]) -> None:
    model = adapt(random_model("Llama"))
    fused, _ = fused_layers(model)
    assert fused is not None
    assert fused.covers(None)
    assert not fused.covers(torch.ones(1, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.covers(None)
    handle = model.base_model.layers[0].register_forward_hook(lambda *_: None)
    assert not fused.covers(None)
    handle.remove()
    assert fused.covers(None)
    checkpoint(model)
    assert not fused.covers(None)


class WrongBackward(Kernels):
    """Kernels whose forward is right."""

    def gate_back(self, grad: Tensor, gate: Tensor, up: Tensor, opened: Tensor | None) -> tuple[Tensor, Tensor]:
        first, second = super().gate_back(grad, gate, up, opened)
        return second, first


class Broken(Kernels):
    """Kernels that do not run here."""

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nat all")


def test_off_a_cpu_gradients_are_measured_too(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any]
) -> None:
    model = adapt(random_model("Llama"))
    for layer in model.base_model.layers:
        nn.init.normal_(layer.mlp.gate_proj.lora_B)
    monkeypatch.setattr("lory.models.fused_body._wants_gradients", lambda weight: True)
    assert fused_layers(model)[1] == ""
    assert fused_layers(model, WrongBackward()) == (None, "the fused layers' gradients are not LlamaForCausalLM's")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_kernels_that_fail_are_told(random_model: Callable[..., Any]) -> None:
    reason = "the fused layers cannot do what LlamaForCausalLM does (no such kernel)"
    assert fused_layers(adapt(random_model("Llama")), Broken()) == (None, reason)


@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_the_model_as_it_was(random_model: Callable[..., Any], training: bool) -> None:
    model = adapt(random_model("Llama")).train(training)
    state = torch.get_rng_state()
    fused_layers(model)
    assert model.training is training
    assert all(part.training is training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_freed_memory_is_kept_where_glibc_is() -> None:
    # in a process of its own, since it holds for the rest of the process
    code = "from lory.models.fused_memory import keep_freed_memory as keep; print(keep())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
