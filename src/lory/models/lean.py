"""A lean forward for decoding on a CPU: the Llama family's layers, with few operations between the products.

At one token a step, a small model spends its time on reading the weights and on the way from one operation to the next.
So q, k and v are one product here, and gate and up another; weights lie transposed, which a CPU reads faster for few
rows (27 GB/s against 16 on one core for SmolLM2's head); and norms and rotations take the fewest operations there are.
The model's own layers keep their names, shapes and values: their weights become views of what was joined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lory.lora as lora
from lory.models.int8 import Int8Linear, is_plain_or_adapted, quantize_weights
from lory.models.matmul import choose_fp32_matmul

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lory_decoder"

# Their decoder layers differ in biases and in norms of q and k alone; in all of them norms come before the products
_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_JOINED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

Product = Callable[[Tensor], Tensor]
"""(M, in) to (M, out)."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one decoder layer does, in its order."""

    attention_norm: nn.Module
    qkv: Product
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    out: Product
    mlp_norm: nn.Module
    gate_up: Product
    act: Callable[[Tensor], Tensor]
    down: Product


@dataclass(frozen=True, slots=True)
class Output:
    """The part of transformers' output that decoding looks at."""

    logits: Tensor
    past_key_values: Any

    def __contains__(self, name: str) -> bool:
        """Whether there is an output of this name, as transformers asks."""
        return name in self.__slots__


class LeanDecoder:
    """The model's forward, called with the arguments that transformers' generation gives it."""

    def __init__(self, model: PreTrainedModel, layers: list[_Layer], head: Product, sources: list[nn.Module]) -> None:
        config = model.config
        self.model, self.layers, self.head = model.base_model, layers, head
        self.embed = model.get_input_embeddings()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scaling = model.base_model.layers[0].self_attn.scaling
        self.sources, self.state = sources, _state(sources)
        settings = getattr(torch.backends.mkldnn, "matmul", None)
        self.fp32_precision: str | None = getattr(settings, "fp32_precision", None)

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the model's layers are still those, with the values, that this was made of."""
        return [*_products(model)] == self.sources and _state(self.sources) == self.state and not model.training

    def __call__(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Output:
        """The logits of the last token alone, (B, 1, V), of (B, T) ids at (B, T) positions after what is cached.

        Args:
            attention_mask: (B, cached + T), 0 for padding; None: there is none.
            past_key_values: the cache; keys and values are added to it.
        """
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = hidden.shape[1]
        if position_ids is None:
            start = past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + tokens, device=hidden.device)[None]
        mask = _mask(attention_mask, tokens)
        # oneDNN is 15 to 20% slower for the products of a single row
        with _default_path(self.fp32_precision if hidden.shape[0] * tokens == 1 else None):
            last = self._run(hidden, position_ids, mask, past_key_values)[:, -1]
            logits = self.head(_norm(self.model.norm, last))[:, None]
        return Output(logits, past_key_values)

    def run_body(self, input_ids: Tensor, position_ids: Tensor, visible: Tensor, past_key_values: Any) -> Tensor:
        """(B, T, H) last states, as the head takes them, of (B, T) ids at (B, T) positions after what is cached.

        Args:
            visible: (B, 1, T, cached + T) bool, which token sees which.
            past_key_values: the cache; keys and values are added to it.
        """
        return _norm(self.model.norm, self._run(self.embed(input_ids), position_ids, visible, past_key_values))

    def run_head(self, states: Tensor) -> Tensor:
        """(B, V) logits of (B, H) states."""
        with _default_path(self.fp32_precision if len(states) == 1 else None):
            return self.head(states)

    def _run(self, hidden: Tensor, position_ids: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """(B, T, H) what the last layer gives for (B, T, H) embeddings."""
        cos, sin = self.model.rotary_emb(hidden, position_ids)
        half = self.head_dim // 2
        # the sign that rotating the halves brings goes into the sine, once for all layers
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        cos, sin = cos[:, :, None], sin[:, :, None]
        rows, tokens, width = hidden.shape
        hidden = hidden.reshape(rows * tokens, width)
        for index, layer in enumerate(self.layers):
            heads = layer.qkv(_norm(layer.attention_norm, hidden)).view(rows, tokens, -1, self.head_dim)
            hidden = hidden + layer.out(self._attend(layer, index, heads, cos, sin, mask, cache))
            gate, up = layer.gate_up(_norm(layer.mlp_norm, hidden)).chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.act(gate) * up)
        return hidden.view(rows, tokens, width)

    def _attend(
        self, layer: _Layer, index: int, heads: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """Rotate, cache and attend: (B, T, q + k + v heads, head_dim) to (B * T, q heads * head_dim)."""
        rows, tokens = heads.shape[:2]
        turned, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = turned.split([self.heads, self.kv_heads], dim=2)
            turned = torch.cat([_norm(layer.q_norm, q), _norm(layer.k_norm, k)], dim=2)
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([second, first], dim=-1).mul_(sin).add_(turned * cos).transpose(1, 2)
        q, k = turned.split([self.heads, self.kv_heads], dim=1)
        k, v = cache.update(k, v.transpose(1, 2), index)
        # fused attention with oneDNN's products takes up to ten times as long (8 prompts of 52 tokens: 8.1 ms, not 1.0)
        with _default_path(None if rows * tokens == 1 else self.fp32_precision):
            attended = _attend(q, k, v, mask, self.scaling)
        return attended.transpose(1, 2).reshape(rows * tokens, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Causal attention of the last T of S tokens: (B, heads, T, head_dim) over (B, kv_heads, S, head_dim)."""
    tokens, length = q.shape[2], k.shape[2]
    if tokens == 1:
        # the queries of a group of heads as if they were tokens: no key is repeated
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)
    causal = mask is None and length == tokens
    if mask is None and not causal:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=k.device).tril(length - tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)


@contextlib.contextmanager
def _default_path(after: str | None) -> Iterator[None]:
    """Leave oneDNN aside for the products in here, where it was chosen for fp32 (see `lory.models.matmul`).

    Args:
        after: the setting afterwards; it is not looked up here, since another thread may be in here, too. None leaves
            the setting alone.
    """
    if after is None:
        yield
        return
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = after


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _mask(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Who sees whom, (B, 1, tokens, all) bool, from (B, all) without padding; None where there is none."""
    if attention_mask is None:
        return None
    real = attention_mask.bool()[:, None, None]
    if tokens == 1:
        return real
    length = real.shape[-1]
    causal = torch.ones(tokens, length, dtype=torch.bool, device=real.device).tril(length - tokens)
    # padding sees itself, since a row that sees nothing has no softmax
    return (real & causal) | torch.eye(length, dtype=torch.bool, device=real.device)[-tokens:]


def prepare_for_decoding(model: PreTrainedModel, int8: bool = False) -> str:
    """Arrange a model that will only generate, in place, for speed on a CPU; returns in words what was done.

    Values stay as they are (int8: as near as a byte comes), and so do names and shapes; no weight is held twice, but
    for layers with an adapter, whose changed weight is a copy. To be called when the adapter, if any, is on; after a
    change of the adapter, again. A model that is trained afterwards decodes through its own forward.

    Args:
        int8: round the linear layers' weights, with their adapter in, and those of the embeddings, to int8. What
            was learnt and what was there can't be told apart any more.
    """
    model.__dict__.pop(NAME, None)
    if model.device.type != "cpu":
        return "decoding: the model's own forward, which is for accelerators"
    # outside of inference mode, whose tensors do not tell when they change
    with torch.inference_mode(False), torch.no_grad():
        done = f"{quantize_weights(model)} layers in int8" if int8 else ""
        if reason := _why_not(model):
            done = done or f"{_transpose_weights(model)} weights transposed"
            return f"decoding: the model's own forward ({reason}), {done}"
        choose_fp32_matmul(model.device)
        layers = [_arrange(layer) for layer in model.base_model.layers]
        decoder = LeanDecoder(model, layers, _join([model.get_output_embeddings()]), [*_products(model)])
        _let_go_of_files(model, decoder.sources)
    object.__setattr__(model, NAME, decoder)
    return f"decoding: lean forward{', ' if done else ''}{done}"


def find_decoder(model: PreTrainedModel) -> LeanDecoder | None:
    """What `prepare_for_decoding` put on the model, unless the model's layers have changed since."""
    decoder = model.__dict__.get(NAME)
    return decoder if decoder is not None and decoder.is_current(model) else None


def _products(model: PreTrainedModel) -> Iterable[nn.Module]:
    """The linear layers that decoding goes through, the head last."""
    for layer in model.base_model.layers:
        for names in _JOINED:
            for name in names:
                yield getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)
    yield model.get_output_embeddings()


def _state(modules: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """Where the modules' tensors are, and how often each was changed in place."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _why_not(model: PreTrainedModel) -> str:
    """Why the lean forward is not for this model; empty where it is."""
    kind, config = type(model), model.config
    if kind.__name__ not in _FAMILY or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is none of {', '.join(_FAMILY)}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some of its layers see a window only"
    if getattr(config, "sliding_window", None) is not None and kind.__name__ == "MistralForCausalLM":
        return "its layers see a window only"
    if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        return "it is not in float32"
    for module in _products(model):
        if not (isinstance(module, Int8Linear) or is_plain_or_adapted(module)):
            return f"one of its layers is a {type(module).__name__}"
    return ""


def _arrange(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, out, gate_up, down = (
        _join([getattr(attention if hasattr(attention, name) else mlp, name) for name in names]) for names in _JOINED
    )
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _Layer(
        layer.input_layernorm, qkv, q_norm, k_norm, out, layer.post_attention_layernorm, gate_up, mlp.act_fn, down
    )


def _join(linears: list[Any]) -> Product:
    """One product for layers of the same input; what they hold themselves become views of it where they can."""
    sizes, bias = [linear.out_features for linear in linears], _join_biases(linears)
    if all(isinstance(linear, Int8Linear) for linear in linears):
        if len(linears) == 1:
            return linears[0]
        weight, scale = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "scale"))
        for linear, *parts in zip(linears, weight.split(sizes), scale.split(sizes), strict=True):
            linear.weight, linear.scale = parts
        return Int8Linear(weight, scale, bias)
    weights = [linear.merged_weight() if _adapted(linear) else linear.weight for linear in linears]
    joined = torch.cat([weight.t() for weight in weights], dim=1).contiguous()
    for linear, part in zip(linears, joined.split(sizes, dim=1), strict=True):
        if not _adapted(linear):
            linear.weight.data = part.t()
    return _Transposed(joined, bias)


def _let_go_of_files(model: nn.Module, arranged: list[nn.Module]) -> None:
    """Copy what is left of the weights, norms above all: a view keeps a whole weight file in memory."""
    there = {id(parameter) for module in arranged for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in there:
            parameter.data = parameter.data.clone()


def _adapted(linear: nn.Module) -> bool:
    return isinstance(linear, lora.Linear) and linear.has_adapter


def _join_biases(linears: list[Any]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    )


class _Transposed:
    """``x W + b`` with W (in, out), its rows one after the other."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """(M, in) to (M, out)."""
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


def _transpose_weights(model: nn.Module) -> int:
    """Lay the fp32 weights of plain linear layers out transposed, in place; returns how many."""
    linears = [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.float32]
    for linear in linears:
        linear.weight.data = linear.weight.t().contiguous().t()
    return len(linears)
