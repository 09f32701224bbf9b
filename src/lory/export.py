"""Handing a model on: an adapter merged into its base, checked against base plus adapter before it is let out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lory.adapters.files import load_adapter
from lory.adapters.merge import MergeReport, merge_shards
from lory.adapters.prompt import check_mergeable
from lory.assistant import check_device
from lory.models.load import default_device, load_config, load_model
from lory.models.resolve import Resolved, resolve
from lory.runtime import LoryError, UsageError, log, write_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest difference of logits, relative to the largest logit, that rounding explains in a precision.
# fp32: 30 layers of sums of 1,536 terms, each to 6e-8. bf16 and fp16 weights are rounded once more by the merge.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Merged:
    """A merged model and how well it agrees with base plus adapter."""

    folder: Path
    report: MergeReport
    difference: float
    """Largest difference of logits, relative to the largest logit."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"folder": str(self.folder), **asdict(self.report), "difference": self.difference}


def merge(
    model: str | Path,
    out: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge the adapter that MODEL carries into its base and write the result to `out`.

    The result is written aside, loaded again, compared with base plus adapter, and only then given its name.

    Args:
        dtype: of the merged weights; by default each tensor keeps its own.
        device: where the products are computed, such as `cpu` or `cuda`.
        progress: called with (done, total) tensors.

    Raises:
        UsageError: MODEL carries no adapter, or `out` exists.
        LoryError: the merged model answers otherwise than base plus adapter; nothing is kept then.
    """
    resolved = resolve(model)
    if resolved.adapter is None:
        raise UsageError(f"'{model}' carries no adapter, so there is nothing to merge.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another folder, or delete it first.")
    check_mergeable(resolved.adapter)
    check_device(device)
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(write_aside(out))
        report = merge_shards(resolved.base_path, resolved.adapter, aside, dtype, max_shard_bytes, device, progress)
        log.info("Comparing the merged model with base and adapter ...")
        difference = compare(resolved, resolved.adapter, aside)
    return Merged(out, report, difference)


def compare(resolved: Resolved, adapter: Path, merged: Path) -> float:
    """The largest difference of logits between base plus adapter and the merged model, relative to the largest logit.

    All is computed in the precision that `auto` gives: fp32 on a CPU, whatever is stored.

    Raises:
        LoryError: it is larger than rounding explains, or rounding has swallowed what the adapter does.
    """
    device = default_device()
    prompts = _random_prompts(resolved, device)
    separate = load_model(resolved, "auto", device)
    base = _logits(separate, prompts)
    load_adapter(separate, adapter)
    expected = _logits(separate, prompts)
    del separate
    together = load_model(Resolved(str(merged), str(merged), merged, None), "auto", device)
    difference, effect = _distance(_logits(together, prompts), expected), _distance(base, expected)
    # what is computed with and what is stored both round; the coarser one decides
    limit = max(_TOLERANCES[together.dtype], _TOLERANCES[_stored_dtype(merged)])
    if not difference <= limit:
        raise LoryError(
            f"The merged model differs from base and adapter by {difference:.1e} of its largest logit (rounding "
            f"explains {limit:.0e}), so it was not kept; try --dtype float32."
        )
    if difference > max(effect / 2, _TOLERANCES[torch.float32]):
        raise LoryError(
            f"The adapter changes the logits by {effect:.1e} of the largest, and rounding the merged weights changes "
            f"them by {difference:.1e}, so the merged model was not kept: try --dtype float32."
        )
    return difference


def _distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    ratios = [(a - b).abs().max() / b.abs().max().clamp(min=1e-6) for a, b in zip(found, expected, strict=True)]
    # torch's maximum of a NaN is NaN, Python's may be a number
    return float(torch.stack(ratios).max())


def _stored_dtype(folder: Path) -> torch.dtype:
    """The coarsest floating-point precision of a model's stored weights."""
    from safetensors import safe_open

    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {names.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118 - no mapping
    return max((dtype for dtype in found if dtype), key=lambda dtype: _TOLERANCES[dtype])


def _random_prompts(resolved: Resolved, device: torch.device) -> list[torch.Tensor]:
    vocabulary = load_config(resolved.base_path).get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in (1, 7, 32)]


def _logits(model: PreTrainedModel, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(prompt, use_cache=False).logits.float() for prompt in prompts]
