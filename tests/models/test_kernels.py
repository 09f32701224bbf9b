"""Each set of kernels computes what the plain operations do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lory.models import kernels
from lory.models.kernels import PLAIN, CompiledKernels, Kernels, LigerKernels, choose_kernels
from lory.runtime import UsageError


def check_alike(found: Kernels, dtype: torch.dtype, tolerance: float) -> None:
    """All parts, at odd sizes, against the plain ones."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, grad, total = draw(7, 24), draw(24), draw(7, 24), draw(7, 24)
    gate, up, inner = draw(7, 40), draw(7, 40), draw(7, 40)
    heads, cos, sin = draw(7, 3, 6), draw(7, 6), draw(7, 6)

    def run(parts: Kernels) -> list[Tensor]:
        opened, again = parts.gate_again(gate, up, wanted=True)
        assert again is not None
        kept = gate.clone(), up.clone()
        grads = parts.gate_back(inner.clone(), *kept, opened)
        # autograd holds these
        assert torch.equal(kept[0], gate)
        assert torch.equal(kept[1], up)
        place = torch.full_like(heads, torch.nan)
        parts.rotate(heads, cos, sin, out=place)
        return [
            parts.normalise(x, weight, 1e-5),
            parts.add_normalise_gradient(total.clone(), grad.clone(), x, weight, 1e-5),
            parts.gate(gate, up),
            again,
            *grads,
            parts.rotate(heads, cos, sin),
            parts.rotate(heads, cos, sin, back=True),
            place,
        ]

    for ours, plain in zip(run(found), run(PLAIN), strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_the_plain_gradients_are_those_of_autograd() -> None:
    x, weight, grad = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 8), (8,), (5, 8)))
    x.requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.rms_norm(x, (8,), weight, 1e-5), x, grad)[0]
    total = torch.ones(5, 8, dtype=torch.float64)
    found = PLAIN.add_normalise_gradient(total, grad.clone(), x.detach(), weight, 1e-5)
    torch.testing.assert_close(found, expected + 1)
    gate, up = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected_pair = torch.autograd.grad(torch.nn.functional.silu(gate) * up, [gate, up], grad)
    with torch.no_grad():
        opened, _ = PLAIN.gate_again(gate, up, wanted=False)
        found_pair = PLAIN.gate_back(grad.clone(), gate, up, opened)
    torch.testing.assert_close(found_pair, expected_pair)


def test_what_is_compiled_computes_the_same() -> None:
    check_alike(CompiledKernels(lambda function: function), torch.float32, 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_compiling_changes_nothing() -> None:
    check_alike(CompiledKernels(), torch.float32, 1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Liger's kernels need a GPU or the interpreter")
def test_ligers_kernels_compute_the_same() -> None:
    pytest.importorskip("liger_kernel")
    check_alike(LigerKernels(), torch.float32, 1e-5)


@pytest.fixture
def with_liger(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A function that has Liger look installed or not."""
    monkeypatch.setattr(kernels, "_make", lambda name: name)
    return lambda there: monkeypatch.setattr(kernels, "has_liger", lambda: there)


def test_ligers_kernels_are_taken_where_they_are(with_liger: Callable[[bool], None]) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with_liger(True)
    assert choose_kernels("auto", cuda) == "liger"
    assert choose_kernels("auto", cpu) == "plain"
    assert choose_kernels("compiled", cuda) == choose_kernels("compiled", cpu) == "compiled"
    with pytest.raises(UsageError, match="the device is 'cpu'"):
        choose_kernels("liger", cpu)
    with_liger(False)
    assert choose_kernels("auto", cuda) == "plain"
    with pytest.raises(UsageError, match="pip install liger-kernel"):
        choose_kernels("liger", cuda)


def test_plain_operations_are_the_default_of_a_cpu() -> None:
    assert choose_kernels("auto", torch.device("cpu")) is PLAIN
    assert choose_kernels("plain", torch.device("cpu")) is PLAIN
