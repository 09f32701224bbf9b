"""Rows with different adapters in one batch, more adapters than places, and the rows' cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_llama
from tests.server.conftest import make_adapter

from lory.runtime import LoryError
from lory.server.catalogue import Catalogue, open_catalogue
from lory.server.runner import Prompt, Runner


@pytest.fixture
def few(tiny_model: object, adapters: dict[str, str]) -> tuple[Catalogue, Runner]:
    """The tiny model with three adapters and two places."""
    return open_catalogue(str(tiny_model), adapters, "tiny", places=2)


def read(runner: Runner, adapter: int | None, length: int = 9) -> torch.Tensor:
    prompt = Prompt(list(range(30, 30 + length)), adapter)
    runner.read(prompt, 100)
    assert prompt.logits is not None
    return prompt.logits


def test_adapters_take_turns_where_places_are_few(
    few: tuple[Catalogue, Runner], opened: tuple[Catalogue, Runner]
) -> None:
    expected = {number: read(opened[1], number) for number in (None, 0, 1, 2)}
    for number in (0, 1, 2, None, 2, 0, 1, 0):
        torch.testing.assert_close(read(few[1], number), expected[number], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1])


def test_the_models_own_forward_has_the_adapters_too(opened: tuple[Catalogue, Runner]) -> None:
    runner = opened[1]
    assert runner.forward is not runner.model
    for number in (None, 0, 1, 2):
        prompt = Prompt(list(range(30, 39)), number)
        logits = runner.read_with_logits(prompt, 100)
        torch.testing.assert_close(logits[-1], read(runner, number), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"quantize": "nf4"}, {"quantize": "int8"}], ids=str)
def test_adapters_go_on_bases_of_few_bits(tmp_path: Path, how: dict[str, Any]) -> None:
    if "quantize" in how:
        pytest.importorskip("bitsandbytes")
    make_llama(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16)
    paths = {name: str(make_adapter(tmp_path / "base", tmp_path / name, seed)) for seed, name in enumerate("ab")}
    _, runner = open_catalogue(str(tmp_path / "base"), paths, **how)
    prompts = [Prompt(list(range(30, 40)), number) for number in (None, 0, 1)]
    for prompt in prompts:
        runner.read(prompt, 100)
        runner.join(prompt)
    together = runner.step([5, 5, 5])
    for row, number in enumerate((None, 0, 1)):
        alone = Prompt([*range(30, 40), 5], number)
        runner.read(alone, 100)
        assert alone.logits is not None
        torch.testing.assert_close(together[row], alone.logits, rtol=0, atol=0.02 * float(alone.logits.abs().max()))
    assert (together[0] - together[1]).abs().max() > 1


def test_rows_of_a_layer_must_be_the_batchs(opened: tuple[Catalogue, Runner]) -> None:
    bank = opened[1].bank
    assert bank is not None
    with torch.inference_mode():
        bank.select([0, 1])
        linear = opened[0].model.get_submodule("model.layers.0.self_attn.q_proj")
        with pytest.raises(LoryError, match="cannot mix adapters"):
            linear(torch.zeros(3, linear.in_features))


def test_a_row_is_what_it_was_whoever_comes_and_goes(opened: tuple[Catalogue, Runner]) -> None:
    runner = opened[1]
    runner.clear()
    text = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = Prompt(text[:10], 0)
    runner.read(prompt, 100)
    runner.join(prompt)
    generator = torch.Generator().manual_seed(1)
    logits = torch.zeros(1)
    # the first row goes on, while others of many lengths come and leave beside it
    for step in range(10, 150):
        if step % 7 == 0 and len(runner.adapters) < 5:
            other = Prompt(text[: int(torch.randint(1, 200, (), generator=generator))], step % 3)
            runner.read(other, 1000)
            runner.join(other)
        if step % 11 == 0 and len(runner.adapters) > 1:
            runner.leave(1 + step % (len(runner.adapters) - 1))
        logits = runner.step([text[step], *[5] * (len(runner.adapters) - 1)])[0]
    alone = Prompt(text[:150], 0)
    runner.read(alone, 1000)
    assert alone.logits is not None
    torch.testing.assert_close(logits, alone.logits, rtol=1e-4, atol=1e-4)
    runner.clear()
