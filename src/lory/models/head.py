"""A causal model as a body that gives hidden states and a head that turns them into logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lory.models.matmul import multiply_wide
from lory.runtime import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """Logits from hidden states, with the model's own scaling and soft-capping."""

    linear: nn.Module
    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(n, H) to (n, V)."""
        logits: Tensor = multiply_wide(hidden, self.linear.weight) if self._is_plain(hidden) else self.linear(hidden)
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def _is_plain(self, hidden: Tensor) -> bool:
        """Whether this is learning through a frozen weight on a CPU, with nothing around it."""
        linear = self.linear
        if type(linear) is not nn.Linear or linear.bias is not None or linear.weight.requires_grad:
            return False
        alike = hidden.is_cpu and hidden.ndim == 2 and hidden.dtype == linear.weight.dtype
        watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__
        return alike and hidden.requires_grad and not watched and not torch.is_autocast_enabled("cpu")


def split_head(model: PreTrainedModel) -> tuple[nn.Module, Head]:
    """The model's body and head, checked: together they give the model's own logits.

    Raises:
        UsageError: they don't, so that the model does something at its end that is not known here.
    """
    body, linear = model.base_model, model.get_output_embeddings()
    config = model.config.get_text_config()
    if body is model or linear is None:
        raise UsageError(f"{type(model).__name__} has no separate output head; lory cannot train it yet.")
    # Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma 2 caps
    multiplier = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(linear, multiplier, getattr(config, "final_logit_softcapping", None))
    device = model.get_input_embeddings().weight.device
    probe = torch.tensor([[1, 2, 3]], device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(probe, use_cache=False).logits
            found = head(body(probe, use_cache=False).last_hidden_state)
    finally:
        model.train(training)
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise UsageError(f"{type(model).__name__} does something after its output head that lory does not know yet.")
    return body, head
