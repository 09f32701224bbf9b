"""The fast path of fp32 products is taken only where it is as exact as the default one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lory.models import matmul
from lory.models.matmul import choose_fp32_matmul, multiply_wide

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """Start from torch's default, and put back what was set."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "none"
    yield
    settings.fp32_precision = before


def test_products_keep_the_accuracy_of_fp32() -> None:
    choose_fp32_matmul(CPU)
    generator = torch.Generator().manual_seed(1)
    for n, k, m in [(256, 576, 576), (31, 123, 47), (1, 576, 1536)]:
        a, b = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
        exact = a.double() @ b.double().T
        error = (torch.nn.functional.linear(a, b).double() - exact).norm() / exact.norm()
        assert error < 2e-6, (n, k, m)


@pytest.mark.parametrize(("fast_error", "chosen"), [(2e-7, "bf16"), (2e-3, "none")])
def test_the_fast_path_is_taken_where_its_measured_error_allows(
    monkeypatch: pytest.MonkeyPatch, fast_error: float, chosen: str
) -> None:
    errors = iter([1e-7, fast_error])
    monkeypatch.setattr(matmul, "_measure_error", lambda: next(errors))
    said = choose_fp32_matmul(CPU)
    assert torch.backends.mkldnn.matmul.fp32_precision == chosen
    assert f"{fast_error:.1e}" in said


def test_a_second_call_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_measure_error", lambda: 1e-7)
    choose_fp32_matmul(CPU)
    monkeypatch.setattr(matmul, "_measure_error", lambda: pytest.fail("measured again"))
    assert "as set before" in choose_fp32_matmul(CPU)


def test_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_measure_error", lambda: pytest.fail("measured"))
    assert "default" in choose_fp32_matmul(torch.device("cuda"))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize("inner", [1, 4, 7, 100])
def test_a_wide_products_gradient_is_made_in_parts(monkeypatch: pytest.MonkeyPatch, inner: int) -> None:
    monkeypatch.setattr(matmul, "_INNER", inner)
    generator = torch.Generator().manual_seed(2)
    x, weight, grad = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 5), (20, 5), (3, 20)))
    x.requires_grad_()
    y = multiply_wide(x, weight)
    torch.testing.assert_close(y, x @ weight.t())
    (found,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(found, grad @ weight)
