"""Weight-only int8: what a product is worth with a byte a weight, and what becomes of a model's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lory.lora as lora
from lory.models.int8 import Int8Embedding, Int8Linear, quantize_weights, round_rows
from lory.models.load import load_model, load_tokenizer
from lory.models.resolve import Resolved


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_row_is_rounded_to_127_steps_either_way() -> None:
    weight = draw(7, 33) * torch.tensor([1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, 0.0])[:, None]
    q, scale = round_rows(weight)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    error = (q * scale.float()[:, None] - weight).abs().amax(dim=1)
    # half a step, the step being at most 1% longer than the largest weight asks for
    assert torch.all(error <= weight.abs().amax(dim=1) / 127 * 0.505)
    assert q.abs().amax(dim=1).tolist() == pytest.approx([126] * 6 + [0], abs=1)


def test_what_bytes_can_hold_comes_back_exactly() -> None:
    weight = torch.tensor([[127.0, -64.0, 1.0, 0.0], [-0.5, 0.25, 0.125, 0.0]])
    linear = Int8Linear(torch.tensor([[127, -64, 1, 0], [-64, 32, 16, 0]], dtype=torch.int8),
                        torch.tensor([1.0, 2**-7], dtype=torch.bfloat16))  # fmt: skip
    assert torch.equal(linear(torch.eye(4)).T, weight)


@pytest.mark.parametrize("rows", [1, 2, 5, 31, 63, 64, 130])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 31), (64, 48), (131, 24), (576, 192)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_near_the_rounded_weights_product(rows: int, shape: tuple[int, int], bias: bool) -> None:
    weight, x = draw(*shape), draw(rows, shape[1], seed=1)
    added = draw(shape[0], seed=2) if bias else None
    q, scale = round_rows(weight)
    expected = nn.functional.linear(x.double(), q.double() * scale.double()[:, None])
    out = Int8Linear(q, scale, added)(x).double() - (added.double() if added is not None else 0)
    # bf16 rounds by 2^-8 at most, going in and coming out
    assert (out - expected).norm() <= 2**-7 * expected.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_those_that_come_in(dtype: torch.dtype) -> None:
    linear = Int8Linear(*round_rows(draw(6, 8)), draw(6))
    out = linear(draw(2, 3, 8).to(dtype))
    assert (out.shape, out.dtype) == ((2, 3, 6), dtype)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    linear, x = Int8Linear(*round_rows(draw(48, 32))), draw(9, 32)
    torch.testing.assert_close(linear(x)[4], linear(x[4]), rtol=2**-7, atol=0)


def test_inputs_may_be_views() -> None:
    linear, x = Int8Linear(*round_rows(draw(48, 32))), draw(9, 5, 64).to(torch.bfloat16)
    torch.testing.assert_close(linear(x[:, 2, ::2]), linear(x[:, 2, ::2].clone()), rtol=0, atol=0)


def test_an_embedding_looks_up_rounded_rows() -> None:
    weight, ids = draw(11, 6), torch.tensor([[3, 0], [10, 3]])
    q, scale = round_rows(weight)
    table = Int8Embedding(q, scale, torch.float32)
    torch.testing.assert_close(table(ids), weight[ids], atol=0.02, rtol=0)
    assert table(ids).dtype == torch.float32


def test_a_model_keeps_its_layers_names_and_its_tie(random_model: Callable[..., Any]) -> None:
    model = random_model("Llama", tie_word_embeddings=True)
    names = [name for name, _ in model.named_modules()]
    assert quantize_weights(model) == 2 * 7 + 2
    assert [name for name, _ in model.named_modules()] == names
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the norms
    assert quantize_weights(model) == 0


def test_an_untied_head_is_rounded_for_itself(random_model: Callable[..., Any]) -> None:
    model = random_model("Llama")
    head, table = model.lm_head.weight.clone(), model.get_input_embeddings().weight.clone()
    quantize_weights(model)
    for module, weight in ((model.lm_head, head), (model.get_input_embeddings(), table)):
        torch.testing.assert_close(module.weight * module.scale.float()[:, None], weight, atol=0.005, rtol=0)


def test_an_adapter_is_merged_before_the_rounding() -> None:
    layer = lora.Linear(24, 16, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B)
    model = nn.Sequential(layer).eval()
    x = draw(3, 24)
    expected = model(x)
    quantize_weights(model)
    assert type(model[0]) is Int8Linear
    assert (model(x) - expected).norm() <= 0.01 * expected.norm()


def test_what_is_not_a_plain_linear_layer_stays() -> None:
    class Scaled(nn.Embedding):
        pass

    model = nn.Sequential(nn.Conv1d(3, 3, 1), Scaled(5, 3), nn.LayerNorm(3), lora.Embedding(5, 3, r=2))
    before = [type(module) for module in model]
    assert quantize_weights(model) == 0
    assert [type(module) for module in model] == before


def test_smollm2_loses_little(smollm2: Path) -> None:
    resolved = Resolved("smollm2", "smollm2", smollm2, None)
    model = load_model(resolved, "float32", torch.device("cpu"))
    text = "The parrot is a bird of the tropics. Parrots are known for their strong, curved bill and their clawed feet."
    ids = torch.tensor([load_tokenizer(resolved)(text)["input_ids"]])
    with torch.no_grad():
        before = model(ids, labels=ids).loss.item()
        quantize_weights(model)
        assert model(ids, labels=ids).loss.item() == pytest.approx(before, rel=0.01)
