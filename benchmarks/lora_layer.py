"""One adapted linear layer's forward and backward: loralib, PEFT and lory in one run.

    python -m benchmarks.lora_layer [--rounds 7] [--device cpu] [--products chosen] [--clock wall] [--json]

The libraries take turns within each round, in an order that turns too, so that a slow moment of the machine hits all
alike; what counts are the ratios within a round. Two kinds of memory: what autograd keeps between forward and backward,
the layer's own parameters aside, and the most that a forward and backward hold at once, input and parameters aside.
`--products chosen` has all libraries multiply fp32 as `lory train` does (`lory.models.matmul`), `default` as torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import loralib
import peft
import torch
from torch import Tensor, nn

import lory.lora as lora
from lory.models.matmul import choose_fp32_matmul

LIBRARIES = ("loralib", "peft", "lory")
RANK, ALPHA = 16, 32
# on a machine with other work only the processor's own time says something, and only with one thread
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Case:
    """A layer and its input: `rows` of `inputs` numbers in, `outputs` numbers out."""

    rows: int
    inputs: int
    outputs: int
    dtype: str
    dropout: float

    def __str__(self) -> str:
        return f"{self.rows}x{self.inputs}->{self.outputs} {self.dtype} dropout {self.dropout}"


# SmolLM2-135M's projections, and wider ones at fewer rows
SHAPES = ((512, 576, 576), (512, 576, 1536), (512, 1536, 576), (256, 2048, 2048))
CASES = [
    Case(*shape, dtype, dropout) for shape in SHAPES for dtype in ("float32", "bfloat16") for dropout in (0.0, 0.1)
]


def make_layer(library: str, case: Case, device: str) -> nn.Module:
    """An adapted layer in training mode, as each library trains on a frozen base: PEFT and lory with fp32 adapters."""
    torch.manual_seed(0)
    base = nn.Linear(case.inputs, case.outputs, bias=False, device=device, dtype=getattr(torch, case.dtype))
    if library == "loralib":
        layer = loralib.Linear(
            case.inputs, case.outputs, r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout, bias=False
        )
        layer.weight.data = base.weight.data.float()
        # loralib's adapters have to have their base's precision
        layer = layer.to(device, base.weight.dtype)
    elif library == "peft":
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout, target_modules=["0"])
        layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    else:
        layer = lora.Linear.from_base(base, RANK, ALPHA, case.dropout)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad = "lora_" in name
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    layer.train()  # gives no layer back in loralib
    return layer


def run_step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """One forward and backward; x wants a gradient, as in all layers of a model but the first."""
    layer(x).backward(grad)
    for parameter in layer.parameters():
        parameter.grad = None
    x.grad = None


def count_saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, each storage once, without the layer's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def count_peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most bytes that a step holds beyond what was there before it."""
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        step()
        return torch.accelerator.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def time_steps(step: Callable[[], None], steps: int, device: str, clock: Callable[[], float]) -> float:
    """Seconds a step: the median, since another process may take the core in the middle of one."""
    times = []
    for _ in range(steps):
        start = clock()
        step()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(clock() - start)
    return statistics.median(times)


def run_case(case: Case, rounds: int, device: str, clock: Callable[[], float]) -> dict[str, Any]:
    """Median milliseconds, bytes kept, and the ratios of lory to the others in each round."""
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.rows, case.inputs, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(case.rows, case.outputs, device=device, dtype=dtype)
    layers = {library: make_layer(library, case, device) for library in LIBRARIES}
    steps = {library: (lambda layer=layer: run_step(layer, x, grad)) for library, layer in layers.items()}
    for step in steps.values():
        time_steps(step, 3, device, clock)
    # about a twentieth of a second a turn, and an odd number for the median
    count = max(3, round(0.05 / time_steps(steps["lory"], 3, device, clock)))
    times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for turn in range(rounds):
        for place in range(len(LIBRARIES)):
            library = LIBRARIES[(turn + place) % len(LIBRARIES)]
            times[library].append(time_steps(steps[library], count, device, clock))
    saved = {library: count_saved_bytes(layer, x) for library, layer in layers.items()}
    peak = {library: count_peak_bytes(step, device) for library, step in steps.items()}
    return {
        **asdict(case),
        "milliseconds": {library: 1e3 * statistics.median(values) for library, values in times.items()},
        "saved_bytes": saved,
        "peak_bytes": peak,
        "time_ratio": {other: summarize(times["lory"], times[other]) for other in ("loralib", "peft")},
        "saved_ratio": {other: saved["lory"] / saved[other] for other in ("loralib", "peft")},
        "peak_ratio": {other: peak["lory"] / peak[other] for other in ("loralib", "peft")},
    }


def summarize(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median, least and largest of lory's time over the other's, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def print_row(case: Case, result: dict[str, Any]) -> None:
    """A line of the table."""
    times = "  ".join(f"{result['milliseconds'][library]:8.2f}" for library in LIBRARIES)
    ratios = "  ".join(f"{r['median']:5.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in result["time_ratio"].values())
    memory = "   ".join(
        "  ".join(f"{result[kind][library] / 1e6:6.2f}" for library in LIBRARIES)
        for kind in ("saved_bytes", "peak_bytes")
    )
    print(f"{case!s:<42} {times}   {ratios}   {memory}")


def main() -> None:
    """Run all cases and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--products", choices=("chosen", "default"), default="chosen")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--only", default="", help="run cases whose name contains this text")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.products == "chosen":
        choose_fp32_matmul(torch.device(arguments.device))
    if not arguments.json:
        columns = (
            f"{'milliseconds a step':^28}   {'lory / loralib, lory / peft':^36}   {'MB kept':^22}   MB at the most"
        )
        print(f"{'rank ' + str(RANK):<42} {columns}")
        print(f"{'':<42} {'  '.join(f'{library:>8}' for library in LIBRARIES)}")
    results = []
    for case in CASES:
        if arguments.only in str(case):
            results.append(run_case(case, arguments.rounds, arguments.device, CLOCKS[arguments.clock]))
            if not arguments.json:
                print_row(case, results[-1])
    if arguments.json:
        versions = {"torch": torch.__version__, "peft": peft.__version__}
        threads = torch.get_num_threads()
        setting = {"rank": RANK, "device": arguments.device, "threads": threads, "products": arguments.products}
        setting["clock"] = arguments.clock
        print(json.dumps({**setting, **versions, "cases": results}))


if __name__ == "__main__":
    main()
