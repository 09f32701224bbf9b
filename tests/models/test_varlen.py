"""Which kernel a device's attention takes, what it is told, and that it keeps to each document."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lory.models import varlen
from lory.models.attention import attend_documents
from lory.models.fused_attention import Seen, attend, attend_back
from lory.models.varlen import Spans, attend_spans, choose_kernel, record

BORDERS = (0, 1, 9, 30)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = torch.bfloat16


def draw(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and a gradient, two groups of three heads."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(30, heads, 8, generator=generator, dtype=dtype) for heads in (6, 2, 2, 6)]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A function that has the choice made as on a GPU with flash attention, and with the flash-attn package or not."""

    def pretend(package: bool) -> None:
        monkeypatch.setattr(varlen, "_has_flash", lambda index: True)
        monkeypatch.setattr(varlen, "_has_package", lambda: package)

    return pretend


def test_the_package_comes_before_torchs_kernel_and_that_before_single_documents(
    on_a_gpu: Callable[[bool], None],
) -> None:
    on_a_gpu(True)
    assert choose_kernel(CUDA, HALF, 64) == "flash-attn"
    assert choose_kernel(CUDA, HALF, 64, dropout=0.1, softcap=30.0) == "flash-attn"
    on_a_gpu(False)
    assert choose_kernel(CUDA, HALF, 64) == "torch"
    assert choose_kernel(CUDA, HALF, 64, dropout=0.1) == "documents"
    assert choose_kernel(CUDA, HALF, 64, softcap=30.0) == "documents"
    assert choose_kernel(CUDA, HALF, 60) == "documents"
    assert choose_kernel(CUDA, HALF, 512) == "documents"
    assert choose_kernel(CUDA, torch.float32, 64) == "documents"
    assert choose_kernel(CPU, HALF, 64) == "documents"


def test_an_old_gpu_attends_document_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_has_flash", lambda index: False)
    assert choose_kernel(CUDA, HALF, 64) == "documents"


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_single_documents_give_what_blocks_give(window: int | None) -> None:
    q, k, v, grad = draw()
    spans = Spans.of(BORDERS, CPU)
    seen = Seen(BORDERS, 0.5, window)
    expected = attend(q, k, v, seen)
    torch.testing.assert_close(attend_spans(q, k, v, spans, 0.5, window), expected)
    recorded = record(q, k, v, spans, 0.5, window)
    torch.testing.assert_close(recorded.out.detach(), expected)
    for ours, theirs in zip(recorded.gradients(grad), attend_back(grad, q, k, v, seen), strict=True):
        torch.testing.assert_close(ours, theirs)


def literal_kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, sides: tuple[int, int]) -> Tensor:
    """What both flash kernels are documented to compute."""
    out = torch.empty_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        scores = torch.einsum("ind,jnd->nij", q[start:end], k[start:end]) * scale
        i, j = torch.meshgrid(torch.arange(end - start), torch.arange(end - start), indexing="ij")
        seen = (j <= i) & ((i - j <= sides[0]) | (sides[0] < 0))
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        out[start:end] = torch.einsum("nij,jnd->ind", weights, v[start:end])
    return out


@pytest.mark.parametrize("window", [None, 5])
def test_the_package_is_told_the_same(
    monkeypatch: pytest.MonkeyPatch, on_a_gpu: Callable[[bool], None], window: int | None
) -> None:
    told: dict[str, Any] = {}

    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **how: Any) -> Tensor:
        told.update(how, longest=(max_q, max_k), offsets=[cu_q.tolist(), cu_k.tolist()], dtype=cu_q.dtype)
        return literal_kernel(q, k, v, cu_q, how["softmax_scale"], how["window_size"])

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "flash-attn")
    q, k, v, _ = draw()
    found = attend_spans(q, k, v, Spans.of(BORDERS, CPU), 0.5, window, softcap=3.0)
    torch.testing.assert_close(found, attend(q, k, v, Seen(BORDERS, 0.5, window)))
    assert told["causal"] is True
    assert told["softcap"] == 3.0
    assert told["longest"] == (21, 21)
    assert told["offsets"] == [list(BORDERS)] * 2
    assert told["dtype"] == torch.int32


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_torchs_kernel_is_told_the_same_with_and_without_shared_keys(
    monkeypatch: pytest.MonkeyPatch, groups: bool, window: int | None
) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **how: Any) -> Tensor:
        assert how.pop("enable_gqa", False) is groups
        assert groups or q.shape == k.shape
        assert how["window_size"] == (-1 if window is None else window - 1, 0)
        return literal_kernel(q, k, v, cu_q, how["scale"], how["window_size"])

    monkeypatch.setattr(varlen, "_torch_kernel", lambda: (run, groups))
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "torch")
    q, k, v, _ = draw()
    found = attend_spans(q, k, v, Spans.of(BORDERS, CPU), 0.5, window)
    torch.testing.assert_close(found, attend(q, k, v, Seen(BORDERS, 0.5, window)))


def test_torchs_kernel_is_where_it_is_looked_for() -> None:
    run, groups = varlen._torch_kernel()
    assert callable(run)
    assert isinstance(groups, bool)


def test_other_models_attention_takes_the_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = draw()
    by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
    borders = torch.tensor(BORDERS, dtype=torch.int32)

    def attend_here(**how: Any) -> Tensor:
        arguments: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": borders, "sliding_window": 5} | how
        return attend_documents(torch.nn.Module(), *by_head, **arguments)[0]

    expected = attend_here()
    monkeypatch.setattr("lory.models.attention.choose_kernel", lambda *_: "torch")
    # a CPU keeps to its blocks, whatever is chosen; a cap leads past them
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "flash-attn")
    monkeypatch.setattr(
        varlen,
        "_run_package",
        lambda q, k, v, spans, scale, window, *_: literal_kernel(q, k, v, spans.offsets, scale, (4, 0)),
    )
    for given in ({}, {"cu_seq_lens_k": borders}):
        torch.testing.assert_close(attend_here(softcap=1e9, **given), expected)
