"""Documents in one row see only themselves: against plain attention in fp64, and model by model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lory.models import attention
from lory.models.attention import attend_documents, document_arguments, documents_apart, keeps_documents_apart

LENGTHS = torch.tensor([1, 7, 2, 31])


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """One dense softmax over the row, (1, T, heads, head_dim), with a mask written out from the definition."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS)
    i, j = torch.meshgrid(torch.arange(len(document)), torch.arange(len(document)), indexing="ij")
    visible = (document[i] == document[j]) & (j <= i) & (i - j < (window or len(document)))
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[0, head] @ k[0, head // group].T * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        heads.append(torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1) @ v[0, head // group])
    return torch.stack(heads, dim=1)[None]


@pytest.mark.parametrize("short_tokens", [0, 7, 128])  # fused attention, both kinds, plain products
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_output_and_gradients_equal_dense_attention(
    monkeypatch: pytest.MonkeyPatch,
    short_tokens: int,
    softcap: float | None,
    window: int | None,
    heads: int,
    kv_heads: int,
    scaling: float | None,
) -> None:
    monkeypatch.setattr(attention, "SHORT_TOKENS", short_tokens)
    generator = torch.Generator().manual_seed(0)
    tokens, width = int(LENGTHS.sum()), 5

    def draw(n: int) -> Tensor:
        return torch.randn(1, n, tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    weight = torch.randn(1, tokens, heads, width, generator=generator, dtype=torch.float64)
    borders = document_arguments(LENGTHS, torch.device("cpu"))["cu_seq_lens_q"]
    found, _ = attend_documents(
        torch.nn.Module(), q, k, v, None, scaling, 0.0, borders, sliding_window=window, softcap=softcap
    )
    expected = attend_plainly(q, k, v, scaling or width**-0.5, window, softcap)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), [q, k, v]),
        torch.autograd.grad((expected * weight).sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("short_tokens", [0, 128])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_is_applied(
    monkeypatch: pytest.MonkeyPatch, short_tokens: int, window: int | None, softcap: float | None
) -> None:
    monkeypatch.setattr(attention, "SHORT_TOKENS", short_tokens)
    q, k, v = torch.randn(3, 1, 2, int(LENGTHS.sum()), 4)
    borders = document_arguments(LENGTHS, torch.device("cpu"))["cu_seq_lens_q"]
    outputs = [
        attend_documents(torch.nn.Module(), q, k, v, None, None, rate, borders, window, softcap)[0]
        for rate in (0.0, 0.5)
    ]
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cu_seq_lens_q": None},
        {"attention_mask": torch.ones(1, 1, 4, 4)},
        {"s_aux": torch.zeros(2)},
    ],
)
def test_what_it_could_not_honour_is_refused(wrong: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 4, 4)
    arguments: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 4])} | wrong
    with pytest.raises(ValueError, match="packed attention needs"):
        attend_documents(torch.nn.Module(), q, q, q, **arguments)


def test_positions_start_anew_at_each_document() -> None:
    arguments = document_arguments(torch.tensor([3, 1, 2]), torch.device("cpu"))
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert arguments["max_length_q"] == arguments["max_length_k"] == 3


def test_the_models_own_attention_comes_back(random_model: Callable[..., Any]) -> None:
    model = random_model("Llama")
    own = model.config._attn_implementation

    def fail() -> None:
        with documents_apart(model):
            assert model.config._attn_implementation == "lory_documents"
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert model.config._attn_implementation == own


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": 4}),
        ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 6}),
        ("Gemma3Text", {"sliding_window": 4}),
        ("Phi3", {}),
        ("GPTNeoX", {}),
        ("OPT", {"ffn_dim": 40, "word_embed_proj_dim": 24}),
    ],
)
def test_these_models_keep_documents_apart(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any]
) -> None:
    assert keeps_documents_apart(random_model(family, **changes), longest=40)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Bloom", {"n_layer": 2, "n_head": 4}),  # position biases (ALiBi) over the whole row
        ("Mpt", {"d_model": 24, "n_heads": 4, "n_layers": 2}),
        ("Mamba", {}),  # states that run on
        ("Rwkv", {"attention_hidden_size": 24}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),  # convolutions across borders
        ("GptOss", {"num_local_experts": 2, "sliding_window": 4}),  # attention sinks
    ],
)
def test_these_models_do_not(random_model: Callable[..., Any], family: str, changes: dict[str, Any]) -> None:
    assert not keeps_documents_apart(random_model(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Phimoe", {"sliding_window": 20, "num_local_experts": 2}),
        ("Llama4Text", {"attention_chunk_size": 20, "intermediate_size_mlp": 40, "num_local_experts": 2}),
    ],
)
def test_a_window_that_only_a_mask_knows_of_is_noticed_where_documents_exceed_it(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any]
) -> None:
    model = random_model(family, **changes)
    assert keeps_documents_apart(model, longest=20)
    assert not keeps_documents_apart(model, longest=40)


def test_the_question_leaves_mode_and_random_numbers_alone(random_model: Callable[..., Any]) -> None:
    model = random_model("Llama").train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    keeps_documents_apart(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
