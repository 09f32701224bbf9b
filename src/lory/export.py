"""Handing a model on: an adapter merged into its base, checked against base plus adapter before it is let out."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lory.adapters.files import AdapterFiles, load_adapter
from lory.adapters.inject import adapted_layers, keep_scale, set_parameter
from lory.adapters.layout import read_layout
from lory.adapters.merge import MergeReport, merge_shards, read_headers
from lory.adapters.prompt import check_mergeable
from lory.assistant import check_device
from lory.models.load import choose_dtype, default_device, load_config, load_model
from lory.models.resolve import Resolved, resolve
from lory.models.streamed import NotStreamable, bring_weights, make_empty
from lory.runtime import LoryError, UsageError, log, read_json, write_aside

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
    trust_remote_code: bool = False,
) -> Merged:
    """Merge the adapter that MODEL carries into its base and write the result to `out`.

    The result is written aside, loaded again, compared with base plus adapter, and only then given its name.

    Args:
        dtype: of the merged weights; by default each tensor keeps its own.
        device: where the products are computed, such as `cpu` or `cuda`.
        progress: called with (done, total) tensors.
        trust_remote_code: let the comparison run Python code that comes with the base model.

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
    _check_code(resolved.base_path, trust_remote_code)
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(write_aside(out))
        report = merge_shards(resolved.base_path, resolved.adapter, aside, dtype, max_shard_bytes, device, progress)
        log.info("Comparing the merged model with base and adapter ...")
        difference = compare(resolved, resolved.adapter, aside, trust_remote_code)
    return Merged(out, report, difference)


def _check_code(base: Path, trust_remote_code: bool) -> None:
    """Refuse a model whose code may not be run, before the merge rather than at its check."""
    try:
        load_config(base, trust_remote_code)
    except UsageError as error:
        if trust_remote_code or "auto_map" not in read_json(base / "config.json"):
            raise
        raise UsageError(
            f"{base} comes with Python code, which checking the merged model would run; read it, and give "
            "--trust-remote-code if you trust it."
        ) from error


def compare(resolved: Resolved, adapter: Path, merged: Path, trust_remote_code: bool = False) -> float:
    """The largest difference of logits between base plus adapter and the merged model, relative to the largest logit.

    All is computed in the precision that `auto` gives: fp32 on a CPU, whatever is stored. Neither model is loaded as a
    whole, where that can be helped: the weights are read module by module as they are needed.

    Raises:
        LoryError: it is larger than rounding explains, or rounding has swallowed what the adapter does.
    """
    device = default_device()
    prompts = _random_prompts(resolved, device, trust_remote_code)
    base, expected = _answer(resolved, adapter, prompts, trust_remote_code)
    (found,) = _answer(Resolved(str(merged), str(merged), merged, None), None, prompts, trust_remote_code)
    difference, effect = _distance(found, expected), _distance(base, expected)
    # what is computed with and what is stored both round; the coarser one decides
    limit = max(_TOLERANCES[choose_dtype("auto", device)], _TOLERANCES[_stored_dtype(merged)])
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


def _random_prompts(resolved: Resolved, device: torch.device, trust_remote_code: bool = False) -> list[torch.Tensor]:
    vocabulary = load_config(resolved.base_path, trust_remote_code).get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in (1, 7, 32)]


def _answer(
    resolved: Resolved, adapter: Path | None, prompts: list[torch.Tensor], trust_remote_code: bool = False
) -> list[list[torch.Tensor]]:
    """Logits of the base model and, where an adapter is given, of the model with it."""
    try:
        if trust_remote_code and "auto_map" in read_json(resolved.base_path / "config.json"):
            raise NotStreamable("it is run by code of its own")
        return _answer_streamed(resolved.base_path, adapter, prompts)
    except NotStreamable as reason:
        log.info("%s is loaded into memory as a whole, since %s.", resolved.base_path, reason)
    model = load_model(resolved, "auto", prompts[0].device, trust_remote_code)
    answers = [_logits(model, prompts)]
    if adapter is not None:
        load_adapter(model, adapter)
        answers.append(_logits(model, prompts))
    return answers


def _answer_streamed(folder: Path, adapter: Path | None, prompts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """`_answer` with no more of the model in memory than the module that runs.

    Raises:
        NotStreamable: this model cannot be run so.
    """
    device = prompts[0].device
    model = make_empty(folder, choose_dtype("auto", device), device)
    keep_scale(model)  # what it stops changes weights before the forward that they are brought for
    with contextlib.ExitStack() as stack:
        fetch = _find_weights(model, folder, device, stack)
        _fill_buffers(model, fetch)
        answers = []
        for part in (None, adapter) if adapter else (None,):
            if part is not None:
                _attach(model, part, device)
            with bring_weights(model, fetch):
                answers.append(_logits(model, prompts))
    if any(row.is_meta for answer in answers for row in answer):
        raise NotStreamable("it does not run a module at a time")
    return answers


def _find_weights(
    model: PreTrainedModel, folder: Path, device: torch.device, stack: contextlib.ExitStack
) -> Callable[[str], torch.Tensor]:
    """A function from a name in the state dict to its tensor, read on `device`; the files stay open with `stack`."""
    entries = read_headers(folder, stack)
    layout = read_layout(folder, read_json(folder / "config.json"), {name: e.shape for name, e in entries.items()})
    if layout.model is None or type(layout.model) is not type(model):
        raise NotStreamable(f"its config.json names another class than {type(model).__name__}")
    state = model.state_dict()
    stored = defaultdict(list)  # a model of many experts has too many tensors to ask the layout each time
    for file_name, piece in layout.pieces.items():
        stored[piece.parameter].append(file_name)
    sources = {}
    for name, tensor in state.items():
        first = layout.ties.get(name, name)
        tied = [target for target, source in layout.ties.items() if source == first]
        # one that is stored itself is loaded from there, tied or not
        sources[name] = next((found for owner in (name, first, *tied) if (found := stored.get(owner))), [])
        shapes = [entries[part].shape for part in sources[name]]
        cuts = [tuple(layout.pieces[part].cut(tensor).shape) for part in sources[name]]
        if cuts != shapes or sum(map(math.prod, shapes)) != tensor.numel():
            raise NotStreamable(f"its files do not hold '{name}' in a form that can be read on its own")

    def fetch(name: str) -> torch.Tensor:
        tensor = torch.empty_like(state[name], device=device)
        for part in sources[name]:
            layout.pieces[part].cut(tensor).copy_(entries[part].file.get_tensor(entries[part].name))
        return tensor

    return fetch


def _fill_buffers(model: PreTrainedModel, fetch: Callable[[str], torch.Tensor]) -> None:
    """Give the buffers that are stored with the weights what is stored."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            tensor.copy_(fetch(name))


def _attach(model: PreTrainedModel, adapter: Path, device: torch.device) -> None:
    """Put an adapter with real tensors on a model whose own are on the meta device."""
    files = AdapterFiles(adapter)
    files.name_parameters(model)
    load_adapter(model, adapter)  # on the meta device, too
    for path, layer in adapted_layers(model):
        values = dict(zip(("lora_A", "lora_B"), files.factors(path), strict=True))
        if (magnitude := files.magnitude(path)) is not None:
            values["lora_magnitude"] = magnitude
        for name, value in values.items():
            set_parameter(layer, name, value.to(device, getattr(layer, name).dtype), trainable=False)
    state = model.state_dict()
    for name, value in files.whole.items():
        if state[name].is_meta:
            set_parameter(model, name, value.to(device, state[name].dtype), trainable=False)


def _logits(model: PreTrainedModel, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits at each prompt's tokens, (T, V) in fp32."""
    # one batch, so that weights are read once; tokens after a prompt's end (itself, repeated) don't change its logits
    longest = max(prompt.shape[1] for prompt in prompts)
    rows = torch.cat([prompt.repeat(1, longest)[:, :longest] for prompt in prompts])
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits.float()
    return [row[: prompt.shape[1]] for row, prompt in zip(logits, prompts, strict=True)]
