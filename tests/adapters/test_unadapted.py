"""Inside of the block a model is what it was before its adapter; afterwards it is what it was before the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.adapters.unadapted import check_removable, unadapted

IDS = torch.tensor([[3, 5, 7, 9, 11]])


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("changes", [{}, {"init": "pissa"}, {"rslora": True}])
def test_the_adapter_is_gone_for_as_long_as_the_block(random_model: Any, family: str, changes: dict[str, Any]) -> None:
    model = random_model(family)
    with torch.no_grad():
        before = model(IDS).logits
    attach_lora(model, AdapterConfig(rank=2, **changes))
    model.train()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    check_removable(model, "loss.divergence")
    for part in model.modules():
        # dropout of the family's own is not what this is about
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        changed = model(IDS).logits
        with unadapted(model):
            torch.testing.assert_close(model(IDS).logits, before)
        assert torch.equal(model(IDS).logits, changed)
    assert not torch.allclose(changed, before)


def test_an_error_inside_of_the_block_brings_the_adapter_back(random_model: Any) -> None:
    model = random_model("Llama")
    attach_lora(model, AdapterConfig(rank=2, alpha=6))
    with pytest.raises(KeyError), unadapted(model):
        raise KeyError
    assert model.base_model.layers[0].mlp.up_proj.scaling == 3.0
