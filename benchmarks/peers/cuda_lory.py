"""lory's training steps on a random model, for `benchmarks.cuda`."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.peers.random_models import (
    ALPHA,
    MAX_NORM,
    RANK,
    RATE,
    TARGETS,
    Meter,
    draw_steps,
    make_model,
    start_alike,
)


def run(job: dict[str, Any], variant: str) -> dict[str, Any]:
    """Train; the variants are lory, lory-plain, lory-compiled, lory-liger, lory-layers and lory-fp8."""
    from accelerate import Accelerator

    from lory.adapters.inject import AdapterConfig, attach_lora
    from lory.data.mixture.collate import collate
    from lory.models.attention import keeps_documents_apart
    from lory.models.fp8 import hold_in_fp8
    from lory.models.kernels import choose_kernels
    from lory.training.objective import Objective
    from lory.training.optim import TrainConfig, build_optimizer
    from lory.training.step import train_step
    from lory.types import Sample

    device = torch.device(job["device"])
    model = make_model(job["shape"], job["tokens"], device)
    attach_lora(model, AdapterConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[job["targets"]]))
    start_alike(model)
    if variant == "lory-fp8":
        hold_in_fp8(model)
    if not keeps_documents_apart(model):
        raise SystemExit("Packed documents see each other on this device.")
    name = variant.removeprefix("lory-")
    kernels = choose_kernels(name if name in ("plain", "compiled", "liger") else "auto", device)
    objective = Objective(model, kernels=kernels).train()
    if name == "layers":
        # the model's own layers, as they are trained where the fused ones do not do
        handle = model.base_model.layers[0].register_forward_hook(lambda *_: None)
        assert handle
    optimizer = build_optimizer(model, TrainConfig(learning_rate=RATE))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    accelerator = Accelerator(cpu=device.type == "cpu")
    meter, steps = Meter(device), draw_steps(job["shape"], job["tokens"], job["steps"])
    for documents in steps:
        batch = collate([Sample(tuple(ids), tuple(labels)) for ids, labels in documents])
        meter.begin()
        result = train_step(objective, [batch], optimizer, schedule, accelerator, MAX_NORM)
        meter.end()
        meter.losses.append(result.loss)
    return meter.report(steps) | {"kernels": kernels.name}
