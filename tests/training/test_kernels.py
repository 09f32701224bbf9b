"""How `train.kernels` and `model.fp8` reach a run, and that what cannot be had is refused before a folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lory.lora.fp8 import LinearFp8
from lory.models.fp8 import hold_in_fp8
from lory.models.kernels import CompiledKernels
from lory.runtime import UsageError
from lory.training.monitor import read_log
from lory.training.run import train


def test_compiled_kernels_learn_what_plain_ones_do(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quick["train"]["max_steps"] = 3
    plain = train(quick)
    used = []

    class Noted(CompiledKernels):
        def __init__(self) -> None:
            super().__init__(lambda function: function)

        def normalise(self, *given: Any) -> Any:
            used.append(True)
            return super().normalise(*given)

    monkeypatch.setattr("lory.training.run.choose_kernels", lambda name, device: {"compiled": Noted()}[name])
    quick["train"]["kernels"] = "compiled"
    compiled = train(quick)
    assert used
    losses = [[line["loss"] for line in read_log(run.folder) if "loss" in line] for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "fp8", True, "model.fp8 is true, which needs an NVIDIA GPU"),
        ("train", "kernels", "liger", "train.kernels is liger, which needs"),
    ],
)
def test_what_a_cpu_cannot_is_refused(quick: dict[str, Any], section: str, key: str, value: Any, message: str) -> None:
    quick[section][key] = value
    with pytest.raises(UsageError, match=message):
        train(quick)
    assert not Path(quick["output"]).exists()


def test_a_run_in_fp8_rounds_the_base_and_trains_the_adapter(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = []

    def note(model: Any) -> int:
        # the tiny model's sizes are odd, which a CPU's products do not mind
        monkeypatch.setattr("lory.lora.fp8.MULTIPLE", 1)
        monkeypatch.setattr("lory.models.fp8.MULTIPLE", 1)
        count = hold_in_fp8(model)
        rounded.extend(part for part in model.modules() if isinstance(part, LinearFp8))
        return count

    monkeypatch.setattr("lory.training.run.check_fp8", lambda device: None)
    monkeypatch.setattr("lory.training.run.hold_in_fp8", note)
    quick["model"]["fp8"] = True
    quick["train"]["max_steps"] = 3
    result = train(quick)
    assert len(rounded) == 14
    assert all(part.lora_B.abs().max() > 0 for part in rounded)
    assert (result.folder / "last" / "adapter_model.safetensors").is_file()
