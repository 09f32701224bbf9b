"""The fast body of a model in training: its decoder layers run as fused functions where they are known to be right.

Which models these are is looked up as far as it shows in their modules, and measured for the rest: on a few tokens the
fused body has to give the states that the model's own gives.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import lory.lora as lora
from lory.lora.fp8 import LinearFp8
from lory.models.fused_attention import Seen
from lory.models.fused_layer import ATTENTION, MLP, run_layer
from lory.models.fused_prefixes import Path, compact
from lory.models.kernels import PLAIN, Kernels
from lory.models.varlen import Spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_HEAD_NORMS = {"q_norm", "k_norm"}
# Tokens of the measurement, two documents
_PROBE = (3, 5)


class _Row(NamedTuple):
    """Documents as the layers see them."""

    positions: Tensor
    """(C)"""
    borders: tuple[int, ...]
    spans: Spans | None = None
    before: tuple[Path, ...] | None = None
    last: Tensor | None = None
    """(W) the tokens that the last layer gives states of; None: all."""


def _lay_out(seq_lens: Tensor, device: torch.device) -> _Row:
    """All tokens of the documents, as they stand there."""
    lengths = seq_lens.tolist()
    borders = (0, *itertools.accumulate(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    return _Row(positions, borders, None if device.type == "cpu" else Spans.of(borders, device))


class FusedLayers:
    """A model's body, from token ids to the last hidden states, for documents packed in a row."""

    def __init__(self, model: PreTrainedModel, kernels: Kernels = PLAIN) -> None:
        self.model, self.kernels = model, kernels

    def __call__(self, input_ids: Tensor, seq_lens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """The states after the last norm; on a CPU, of what has to be computed (`fused_prefixes`).

        Args:
            input_ids: (1, T).
            seq_lens: (documents) their lengths, on the CPU.
            wanted: (1, T) whose states will be looked at, others may be anything; None: all.

        Returns:
            (1, T, H), differentiable in the adapters.
        """
        if not input_ids.is_cpu or self._drops():
            return self._run(input_ids, _lay_out(seq_lens, input_ids.device))[None]
        row = compact(input_ids[0], seq_lens.tolist(), None if wanted is None else wanted[0])
        plan = _Row(row.positions, row.borders, None, row.before, row.last)
        return self._run(input_ids[:, row.kept], plan).index_select(0, row.places)[None]

    def _run(self, input_ids: Tensor, row: _Row) -> Tensor:
        """(W, H) from (1, C)."""
        body = self.model.base_model
        x = body.embed_tokens(input_ids)
        cos, sin = (t[0] for t in body.rotary_emb(x, position_ids=row.positions[None]))
        x = x[0]
        layers = body.layers[: body.config.num_hidden_layers]
        for number, layer in enumerate(layers, 1):
            attention = layer.self_attn
            seen = Seen(row.borders, attention.scaling, _window(attention), row.spans, row.before)
            x = run_layer(layer, x, cos, sin, seen, self.kernels, row.last if number == len(layers) else None)
        states: Tensor = body.norm(x)
        return states

    def _drops(self) -> bool:
        """Whether adapters drop something now, each document something else."""
        parts = (part for part in self.model.modules() if isinstance(part, lora.Linear))
        return any(part.training and part.has_adapter and part.lora_dropout for part in parts)

    def covers(self, attention_mask: Tensor | None) -> bool:
        """Whether this forward may be fused: not of padded rows, nor with autocast, hooks or checkpointing by now."""
        device = self.model.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return attention_mask is None and not autocast and not _explain_modules(self.model)


def fused_layers(model: PreTrainedModel, kernels: Kernels = PLAIN) -> tuple[FusedLayers | None, str]:
    """The fast body of `model` with its adapter, or None and the reason, as a clause that says what is in the way."""
    if reason := _explain_body(model):
        return None, reason
    for index, layer in enumerate(model.base_model.layers):
        if reason := _explain_layer(layer):
            return None, f"layer {index} {reason}"
    fused = FusedLayers(model, kernels)
    if reason := _measure_difference(model, fused):
        return None, reason
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
    fp8 = {id(part.weight) for part in model.modules() if isinstance(part, LinearFp8)}
    weights = [p for n, p in model.base_model.named_parameters() if ".lora_" not in n and id(p) not in fp8]
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
    if type(part) not in (nn.Linear, lora.Linear, LinearFp8):
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


def _measure_difference(model: PreTrainedModel, fused: FusedLayers) -> str:
    """What is in the way of the fused body: other states than the model's own, each document alone, or on other devices
    than CPUs, where not all of its parts are tested, other gradients; empty if nothing is."""
    name, weight = type(model).__name__, model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(len(weight), (1, n), generator=generator).to(weight.device) for n in _PROBE]
    learnt = [p for p in model.base_model.parameters() if p.requires_grad] if _wants_gradients(weight) else []
    training = model.training
    model.eval()
    try:
        with torch.set_grad_enabled(bool(learnt)):
            alone = [model.base_model(d, use_cache=False).last_hidden_state for d in documents]
            expected, found = torch.cat(alone, dim=1), fused(torch.cat(documents, dim=1), torch.tensor(_PROBE))
            gradients = [_differentiate(states, learnt) for states in (found, expected)]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        # it wants other arguments or has other shapes, which is the answer to the question
        return f"the fused layers cannot do what {name} does ({str(error).partition(chr(10))[0].rstrip('.')})"
    finally:
        model.train(training)
    limit = 5e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if any(isinstance(part, LinearFp8) for part in model.modules()):
        limit = 1e-1  # a number between two of FP8 falls to either side
    if (found - expected).abs().max() > limit * expected.abs().max().clamp(min=1e-6):
        return f"{name} computes something that the fused layers do not"
    ours, theirs = gradients
    if (ours - theirs).norm() > 3 * limit * theirs.norm():
        return f"the fused layers' gradients are not {name}'s"
    return ""


def _wants_gradients(weight: Tensor) -> bool:
    return not weight.is_cpu


def _differentiate(states: Tensor, learnt: list[Tensor]) -> Tensor:
    """The gradient of a function of the states to all that is learnt, in one vector."""
    if not learnt:
        return states.new_zeros(1)
    # any function will do whose gradient is not the same everywhere
    value = (states.float() * torch.linspace(-1, 1, states.shape[-1], device=states.device)).sum()
    gradients = torch.autograd.grad(value, learnt, allow_unused=True)
    return torch.cat([gradient.float().flatten() for gradient in gradients if gradient is not None])
