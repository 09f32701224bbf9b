"""The fast body of a model in training: its decoder layers run as fused functions where they are known to be right.

Which models these are is looked up as far as it shows in their modules, and measured for the rest: on a few tokens the
fused body has to give the states that the model's own gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import lory.lora as lora
from lory.models.fused_attention import Seen
from lory.models.fused_layer import ATTENTION, MLP, run_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_HEAD_NORMS = {"q_norm", "k_norm"}
# Tokens of the measurement, two documents
_PROBE = (3, 5)


class FusedLayers:
    """A model's body, from token ids to the last hidden states, for documents packed in a row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """The states after the last norm.

        Args:
            input_ids: (1, T).
            seq_lens: (documents) their lengths, on the CPU.

        Returns:
            (1, T, H), differentiable in the adapters.
        """
        body = self.model.base_model
        lengths = seq_lens.tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(input_ids.device)
        borders = (0, *seq_lens.cumsum(0).tolist())
        x = body.embed_tokens(input_ids)
        cos, sin = (t[0] for t in body.rotary_emb(x, position_ids=positions))
        x = x[0]
        for layer in body.layers[: body.config.num_hidden_layers]:
            attention = layer.self_attn
            x = run_layer(layer, x, cos, sin, Seen(borders, attention.scaling, _window(attention)))
        return body.norm(x)[None]

    def covers(self, attention_mask: Tensor | None) -> bool:
        """Whether this forward may be fused: not of padded rows, nor with autocast, hooks or checkpointing by now."""
        device = self.model.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return attention_mask is None and not autocast and not _explain_modules(self.model)


def fused_layers(model: PreTrainedModel) -> tuple[FusedLayers | None, str]:
    """The fast body of `model` with its adapter, or None and the reason, as a clause that says what is in the way."""
    if reason := _explain_body(model):
        return None, reason
    for index, layer in enumerate(model.base_model.layers):
        if reason := _explain_layer(layer):
            return None, f"layer {index} {reason}"
    fused = FusedLayers(model)
    if not _measures_alike(model, fused):
        return None, f"{type(model).__name__} computes something that the fused layers do not"
    return fused, ""


def _explain_body(model: PreTrainedModel) -> str:
    body = model.base_model
    name = type(model).__name__
    if body is model or set(body._modules) != _BODY or not isinstance(body.layers, nn.ModuleList):
        return f"{name} is not built like Llama"
    others = [path for path, part in model._modules.items() if part is not body and path != "lm_head"]
    if others:
        return f"the model carries '{others[0]}'"
    if reason := _explain_modules(model):
        return reason
    weights = [p for n, p in model.base_model.named_parameters() if ".lora_" not in n]
    if len({(p.dtype, p.device) for p in weights}) > 1 or not weights[0].is_floating_point():
        return "the weights differ in precision or place"
    return ""


def _explain_modules(model: nn.Module) -> str:
    """What was put around a module, which running the layers as functions would pass by; it can come at any time."""
    for path, part in model.named_modules():
        if getattr(part, "gradient_checkpointing", False):
            return "gradient checkpointing is on"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return f"'{path}' has a hook"
        if "forward" in part.__dict__:
            return f"'{path}' has a forward of its own"
    return ""


def _explain_layer(layer: nn.Module) -> str:
    """What of a decoder layer is not covered, as a predicate; empty if nothing is."""
    if set(layer._modules) != _LAYER:
        return "is not built like Llama's"
    attention, mlp = layer.self_attn, layer.mlp
    if set(attention._modules) - set(ATTENTION) not in (set(), _HEAD_NORMS) or not hasattr(attention, "scaling"):
        return "has another kind of attention"
    if set(mlp._modules) - {"act_fn"} != set(MLP) or not _is_silu(mlp):
        return "has an MLP that is not gated by silu"
    if getattr(attention, "attention_dropout", 0.0):
        return "has attention dropout"
    if any(getattr(attention, name, None) for name in ("sinks", "attn_logit_softcapping")):
        return "has another kind of attention"
    for name in (*ATTENTION, *MLP):
        part = (attention if name in ATTENTION else mlp)._modules.get(name)
        if reason := _explain_projection(part):
            return f"has a '{name}' that {reason}"
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention._modules[name] for name in _HEAD_NORMS if name in attention._modules]
    for norm in norms:
        if set(dict(norm.named_parameters())) != {"weight"} or not _epsilon(norm):
            return "has a norm that is not RMSNorm"
        if hasattr(norm, "variance_epsilon") and norm.weight.dtype == torch.float64:
            return "has a norm that rounds to float32"  # as transformers' own do
        if norm.weight.requires_grad:
            return "has a norm that is trained"
        if norm.weight.ndim != 1:
            return "has a norm that is not RMSNorm"
    return ""


def _is_silu(mlp: nn.Module) -> bool:
    # transformers has a class of its own for silu
    return type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _epsilon(norm: nn.Module) -> bool:
    return hasattr(norm, "variance_epsilon") or hasattr(norm, "eps")


def _explain_projection(part: Any) -> str:
    if type(part) not in (nn.Linear, lora.Linear):
        return "is quantized, or no plain linear layer"
    if part.weight.requires_grad or (part.bias is not None and part.bias.requires_grad):
        return "is trained in full"
    if not isinstance(part, lora.Linear) or not part.has_adapter:
        return ""
    if part.has_magnitude:
        return "is DoRA's"
    if part.has_start:
        return "is PiSSA's"
    if part.fan_in_fan_out or part.merge_weights:
        return "may be merged or transposed"
    return ""


def _window(attention: nn.Module) -> int | None:
    """How many tokens back the layer sees; None: all."""
    if hasattr(attention, "sliding_window"):
        own: int | None = attention.sliding_window
        return own
    shared: int | None = getattr(attention.config, "sliding_window", None)
    return shared


def _measures_alike(model: PreTrainedModel, fused: FusedLayers) -> bool:
    """Whether the fused body gives the states of the model's own, each document alone."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(len(weight), (1, n), generator=generator).to(weight.device) for n in _PROBE]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = [model.base_model(d, use_cache=False).last_hidden_state for d in documents]
            found = fused(torch.cat(documents, dim=1), torch.tensor(_PROBE))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        # it wants other arguments or has other shapes, which is the answer to the question
        return False
    finally:
        model.train(training)
    states = torch.cat(expected, dim=1)
    limit = 5e-2 if states.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool((found - states).abs().max() <= limit * states.abs().max().clamp(min=1e-6))
