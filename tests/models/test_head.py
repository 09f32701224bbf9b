"""A model's body and head, taken apart, give the model's own logits; where they would not, lory refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lory.models.head import Head, split_head
from lory.runtime import UsageError

IDS = torch.tensor([[5, 17, 99, 3, 64], [1, 2, 8, 130, 7]])

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("Gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 6}),
    ("Cohere", {"logit_scale": 0.0625}),
    ("Granite", {"logits_scaling": 5.0, "embedding_multiplier": 3.0}),
    ("GPTNeoX", {}),
    ("GPT2", {"n_layer": 2, "n_head": 4, "n_embd": 24}),
    ("Bloom", {"n_layer": 2, "n_head": 4}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_head_of_body_gives_the_models_logits(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any]
) -> None:
    model = random_model(family, **changes)
    body, head = split_head(model)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        found = head(body(IDS, use_cache=False).last_hidden_state)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_scaling_comes_before_the_cap() -> None:
    linear = torch.nn.Linear(3, 5, bias=False).double()
    hidden = 10 * torch.randn(4, 3, dtype=torch.float64)
    expected = 2.0 * torch.tanh(0.5 * linear(hidden) / 2.0)
    torch.testing.assert_close(Head(linear, multiplier=0.5, softcap=2.0)(hidden), expected)
    assert expected.abs().max() > 1.5  # the cap is felt


@pytest.mark.parametrize("training", [True, False])
def test_splitting_leaves_the_mode_as_it_was(random_model: Callable[..., Any], training: bool) -> None:
    model = random_model("Llama").train(training)
    split_head(model)
    assert all(module.training is training for module in model.modules())


def test_a_model_that_changes_its_logits_afterwards_is_refused(random_model: Callable[..., Any]) -> None:
    class Sharpened(LlamaForCausalLM):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            output.logits = output.logits * 1.01
            return output

    model = random_model("Llama")
    model.__class__ = Sharpened
    with pytest.raises(UsageError, match="Sharpened does something after its output head"):
        split_head(model)


def test_a_model_without_a_head_is_refused(random_model: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="LlamaModel has no separate output head"):
        split_head(random_model("Llama").model)


def test_a_heads_gradient_is_the_models_own_whatever_is_put_on_it(random_model: Callable[..., Any]) -> None:
    model = random_model("Granite", logits_scaling=5.0)
    _, head = split_head(model)
    grad = torch.randn(3, model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    states = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = head.linear.weight
    expected = [grad @ weight.detach() / 5, grad.t() @ states.detach() / 5]
    # trained: by autograd; frozen: by our own product; with a hook: by the module, so that the hook sees it
    found = torch.autograd.grad(head(states), [states, weight], grad)
    torch.testing.assert_close(found, tuple(expected), rtol=1e-5, atol=1e-6)
    weight.requires_grad = False
    torch.testing.assert_close(torch.autograd.grad(head(states), states, grad)[0], expected[0], rtol=1e-5, atol=1e-6)
    seen: list[int] = []
    head.linear.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(torch.autograd.grad(head(states), states, grad)[0], expected[0], rtol=1e-5, atol=1e-6)
    assert seen == [1]
