"""AdamW for half-precision weights: each has an fp32 copy, its master, that takes the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

MASTER = "master"
_HALF = (torch.bfloat16, torch.float16)


class MasterAdamW(torch.optim.AdamW):
    """AdamW that updates fp32 masters of half-precision parameters and rounds them into the parameters.

    A bf16 weight has 8 bits of precision, so that an update below 1/512 of it changes nothing, ever; the master adds
    such updates up. For fp32 parameters this is plain AdamW. `param_groups` holds the masters in the parameters' place;
    the state dict holds them too, so a run that is resumed goes on with all bits.

    A half-precision parameter takes 2 bytes, and 2 for its gradient, 4 for the master and 8 for the moments: as much as
    an fp32 one.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        super().__init__([{**group, "params": [self._find_master(p) for p in group["params"]]} for group in groups], lr)

    def _find_master(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype not in _HALF:
            return parameter
        master = nn.Parameter(parameter.detach().float())
        self._pairs.append((parameter, master))
        return master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; it uses up the gradients of parameters that have masters."""
        if closure is not None:
            raise ValueError("a closure was given; gradients are expected to be there when the step is taken")
        for parameter, master in self._pairs:
            # one after the other, so that only one gradient is there twice
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._update()
        for parameter, master in self._pairs:
            parameter.copy_(master)
            master.grad = None
        return None

    def _update(self) -> None:
        """Take the step of what `param_groups` holds."""
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, the half-precision parameters' included."""
        super().zero_grad(set_to_none)
        for parameter, _ in self._pairs:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, in which the state of a parameter with a master has it as `MASTER`."""
        state: dict[str, Any] = super().state_dict()
        for number, master in self._list_masters().items():
            state["state"][number] = {**state["state"].get(number, {}), MASTER: master.detach()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back a `state_dict`.

        Raises:
            ValueError: it lacks a master, or has one too many: the parameters had another precision.
        """
        masters = self._list_masters()
        stored = {number: values[MASTER] for number, values in state_dict["state"].items() if MASTER in values}
        if stored.keys() != masters.keys():
            raise ValueError(f"{len(stored)} fp32 masters are stored, and this optimizer has {len(masters)}")
        rest = {
            number: {name: value for name, value in values.items() if name != MASTER}
            for number, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": {number: values for number, values in rest.items() if values}})
        for number, master in masters.items():
            master.copy_(stored[number])

    def _list_masters(self) -> dict[int, nn.Parameter]:
        """Masters by their number in the state dict."""
        ours = {id(master) for _, master in self._pairs}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {number: p for number, p in enumerate(parameters) if id(p) in ours}
