"""An adapter merged into its base model on disk, a shard at a time: W + scaling * B A, and the files around it."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lory.adapters.files import CONFIG_FILE, AdapterFiles
from lory.adapters.layout import Layout, Piece, read_layout
from lory.adapters.targets import Kind, list_targets
from lory.lora.functional import delta_weight
from lory.lora.layer import norm_outputs, spread
from lory.runtime import LoryError, UsageError, explain_os_error, read_json, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# safetensors' names; float8 holds codes rather than numbers (its scales lie elsewhere), so it is never cast or merged
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_FROM_BASE = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "tokenizer*", "LICENSE*", "NOTICE*")
# An adapter_config.json would make transformers load an adapter on top; the others speak of files that are not copied
_NEVER = ("config.json", "*.index.json", CONFIG_FILE, "MANIFEST.json", "trainer_state.json", "README*", "*.safetensors")
_FROM_ADAPTER = (
    *("tokenizer*", "chat_template*", "generation_config*", "special_tokens_map*", "added_tokens*"),
    *("processor_config.json", "image_resizing.json"),
)


@dataclass(frozen=True)
class MergeReport:
    """What was written: all tensors, those that got a delta, weight files, and the bytes of all tensors."""

    tensors: int
    merged: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class _Entry:
    """A tensor of the base, known by its file's header only."""

    file: Any  # an open safe_open handle
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: torch.dtype

    def dtype_after(self, dtype: torch.dtype | None) -> torch.dtype:
        return dtype if dtype is not None and self.dtype in _FLOATS else self.dtype


def merge_shards(
    base: Path,
    adapter: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the model folder `base` with the adapter in it into the existing folder `out`.

    Holds one output shard and one tensor in memory. A delta is added in fp32 (fp64 where the base or adapter is) and
    rounded once. When this raises, `out` may hold a part of the model: give a folder that is renamed afterwards.

    Args:
        base: a Hugging Face model folder with safetensors weights.
        dtype: float64, float32, float16 or bfloat16 for all floating-point tensors; None keeps each tensor's own.
        max_shard_bytes: upper limit of a weight file's tensors; one tensor that is bigger gets a file of its own.
        device: where the deltas are computed and added.
        progress: called after each tensor with how many are done and how many there are.

    Raises:
        UsageError: base and adapter don't fit, or one of them cannot be merged; nothing has been written.
        LoryError: the disk is full, or a value does not fit into `dtype`.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise UsageError(f"dtype {dtype} was given; float64, float32, float16 or bfloat16 is expected.")
    config = _read_config(base)
    files = AdapterFiles(adapter)
    try:
        with contextlib.ExitStack() as stack:
            entries = read_headers(base, stack)
            layout = read_layout(base, config, {name: entry.shape for name, entry in entries.items()})
            changes = _plan_changes(files, layout, entries, base, config)
            if _untie(changes, files, layout, entries):
                config = _set_everywhere(config, tie_word_embeddings=False)
            _check_changes(changes, files, layout, entries, base)
            sizes = {name: math.prod(e.shape) * e.dtype_after(dtype).itemsize for name, e in entries.items()}
            plan = split_state_dict_into_shards_factory(
                sizes,
                get_storage_size=int,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_bytes,
            )
            write_json(out / "config.json", _set_dtype(config, dtype) if dtype else config)
            _copy_companions(base, adapter, out)
            done = 0

            def make_tensor(name: str) -> Tensor:
                nonlocal done
                tensor = _make_tensor(name, entries[name], layout.pieces.get(name), changes, files, dtype, device)
                done += 1
                if progress:
                    progress(done, len(entries))
                return tensor

            for file_name, names in plan.filename_to_tensors.items():
                _write_shard(out / file_name, names, make_tensor)
            if plan.is_sharded:
                write_json(out / INDEX_FILE, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    except OSError as error:
        raise explain_os_error(error, f"merge {adapter} into {base}") from error
    return MergeReport(len(entries), len(files.modules), len(plan.filename_to_tensors), plan.metadata["total_size"])


def parse_size(text: str) -> int:
    """Bytes meant by "5GB", "2.5 GiB", "500MB" or a plain number of bytes; upper and lower case are the same.

    Raises:
        UsageError: the text is not a size of at least one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip(), re.IGNORECASE | re.ASCII)
    size = 0
    if match:
        number, prefix, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index((prefix or " ").lower()))
    if size < 1:
        raise UsageError(f"'{text}' was given as a size; a number of bytes or one like 5GB, 500MB or 2GiB is expected.")
    return size


def _read_config(base: Path) -> dict[str, Any]:
    config = read_json(base / "config.json")
    if not isinstance(config, dict):
        raise UsageError(f"{base / 'config.json'} is not a JSON object; {base} is not a model folder.")
    if config.get("quantization_config"):
        raise UsageError(f"{base} is quantized; merge into the original 16- or 32-bit model that it was made from.")
    return config


def read_headers(base: Path, stack: contextlib.ExitStack) -> dict[str, _Entry]:
    """All tensors of a model folder, whose files stay open until `stack` closes; no tensor is read."""
    weight_map = _read_weight_map(base)
    paths = sorted({base / name for name in weight_map.values()}) or [base / SINGLE_FILE]
    entries: dict[str, _Entry] = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError as error:
            raise UsageError(f"{path} does not exist; {base} is incomplete, fetch the model again.") from error
        except SafetensorError as error:
            raise UsageError(f"{path} is not a whole safetensors file: {error}.") from error
        for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
            if weight_map.get(name, path.name) != path.name:
                continue  # the index says that another file has the one that counts
            header = file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise UsageError(f"{path} holds '{name}' as {header.get_dtype()}, a type that lory cannot copy.")
            entries[name] = _Entry(file, name, tuple(header.get_shape()), _DTYPES[header.get_dtype()])
    if missing := [name for name in weight_map if name not in entries]:
        raise UsageError(f"{base / INDEX_FILE} names '{missing[0]}', which {weight_map[missing[0]]} does not hold.")
    return entries


def _read_weight_map(base: Path) -> dict[str, str]:
    """Which file has which tensor, by the index; empty for a model of one file (which wins, as in transformers)."""
    if (base / SINGLE_FILE).exists():
        return {}
    if (base / INDEX_FILE).exists():
        index = read_json(base / INDEX_FILE)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UsageError(f"{base / INDEX_FILE} has no 'weight_map'; fetch the model again.")
        return weight_map
    if any(base.glob("pytorch_model*.bin")):
        raise UsageError(f"{base} has pytorch_model.bin, a pickle, which is not read: save the model as safetensors.")
    raise UsageError(f"{base} has neither {SINGLE_FILE} nor {INDEX_FILE}; a model folder with weights is expected.")


@dataclass(frozen=True)
class _Change:
    """What becomes of one parameter: scaling * B A is added and, for DoRA, each output's row gets its length."""

    module: str
    kind: Kind
    transposed: bool
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the change is one of a parameter of this shape."""
        A, B = self.lora_A.shape, self.lora_B.shape
        if len(A) != len(B) or A[-2] != B[-1] or (self.magnitude is not None and self.magnitude.shape != B[:1]):
            return False
        if self.kind == "convolution":
            return len(shape) > 2 and B[0] == shape[0] and A[1] == math.prod(shape[1:])
        own = (*A[:-2], A[-1], B[-2]) if self.transposed else (*A[:-2], B[-2], A[-1])
        return own == shape

    def apply(self, tensor: Tensor, piece: Piece) -> Tensor:
        """The changed piece, wide; `tensor` is what the piece was."""
        lora_A = self.lora_A if piece.expert is None else self.lora_A[piece.expert]
        lora_A, lora_B = (
            factor.to(tensor.device, torch.promote_types(factor.dtype, _wide(tensor.dtype)))
            for factor in (lora_A, piece.cut(self.lora_B))
        )
        if self.transposed:
            lora_A, lora_B = lora_B.transpose(-2, -1), lora_A.transpose(-2, -1)
        # added in place on the delta: a wide copy of the weight is never made
        changed = delta_weight(lora_A, lora_B, self.scaling).view(tensor.shape).add_(tensor)
        if self.magnitude is not None:
            axis = int(self.transposed)
            scale = piece.cut(self.magnitude).to(changed) / norm_outputs(changed, axis)
            changed.mul_(spread(scale, changed, axis))
        return changed


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _plan_changes(
    files: AdapterFiles, layout: Layout, entries: Mapping[str, _Entry], base: Path, config: Mapping[str, Any]
) -> dict[str, _Change]:
    """What becomes of each adapted parameter, by its name in the model."""
    if layout.model is not None:
        files.name_parameters(layout.model)
    elif files.config.get("target_parameters"):
        raise UsageError(
            f"{files.folder} adapts bare parameters; {base} has a model of its own code, which hides them."
        )
    targets = list_targets(layout.model) if layout.model is not None else {}
    changes = {}
    for module in files.modules:
        target = targets.get(module)
        if target is None and layout.model is not None:
            raise _no_weight(files, module, base)
        kind = target.kind if target else _guess_kind(files, module, entries)
        if (kind == "embedding") != (module in files.embeddings):
            raise UsageError(f"{files.folder} and {base} disagree whether '{module}' is an embedding.")
        # a head that is tied needs the model's own word about it
        if layout.model is None and config.get("tie_word_embeddings") is True and module.endswith("lm_head"):
            raise UsageError(
                f"{files.folder} adapts '{module}.weight', which is tied to the embeddings in {base}; use "
                "the adapter unmerged."
            )
        transposed = kind in ("conv1d", "embedding") or (target is not None and target.transposed)
        change = _Change(
            module, kind, transposed, *files.factors(module), files.scaling(module), files.magnitude(module)
        )
        changes[module if target and target.owner else f"{module}.weight"] = change
    return changes


def _guess_kind(files: AdapterFiles, module: str, entries: Mapping[str, _Entry]) -> Kind:
    """The kind of layer where there is no model to ask."""
    entry = entries.get(f"{module}.weight")
    if module in files.embeddings:
        return "embedding"
    if entry is not None and len(entry.shape) > 2:
        return "convolution"
    return "conv1d" if files.config.get("fan_in_fan_out") else "linear"


def _no_weight(files: AdapterFiles, module: str, base: Path) -> UsageError:
    return UsageError(
        f"{files.folder} adapts '{module}.weight', but there is no such weight in {base}; merge into the model that it "
        "was made for."
    )


def _untie(changes: Mapping[str, _Change], files: AdapterFiles, layout: Layout, entries: dict[str, _Entry]) -> bool:
    """Give tied parameters tensors of their own where the adapter makes them differ; whether it does."""
    touched = changes.keys() | files.whole.keys()
    if not any(target in touched or source in touched for target, source in layout.ties.items()):
        return False
    for pair in layout.ties.items():
        stored = [name for parameter in pair for name in layout.stored(parameter)]
        # where both are stored, transformers loads both; where neither is, the check that follows says so
        if len(stored) == 1:
            missing = next(name for name in pair if name != layout.pieces[stored[0]].parameter)
            entries[missing] = entries[stored[0]]
            layout.pieces[missing] = Piece(missing)
    return True


def _check_changes(
    changes: Mapping[str, _Change],
    files: AdapterFiles,
    layout: Layout,
    entries: Mapping[str, _Entry],
    base: Path,
) -> None:
    """Refuse an adapter with something that has no place of its own in the base, another shape, or NaN in it."""
    shapes = {name: tuple(value.shape) for name, value in layout.model.state_dict().items()} if layout.model else {}
    for parameter, change in changes.items():
        names = layout.stored(parameter)
        if not names:
            if parameter in shapes and entries.keys() - layout.pieces.keys():
                raise UsageError(
                    f"{files.folder} adapts '{parameter}', which {base} may hold in a form that lory cannot merge "
                    "into; load that model with transformers, save it with save_original_format=False, merge there."
                )
            raise _no_weight(files, change.module, base)
        entry = entries[names[0]]
        shape = entry.shape if layout.pieces[names[0]] == Piece(parameter) else shapes[parameter]
        if not change.fits(shape):
            raise UsageError(
                f"{files.folder} has A {tuple(change.lora_A.shape)} and B {tuple(change.lora_B.shape)} for "
                f"'{change.module}', whose weight is {shape} in {base}; merge into the model that it was made for."
            )
        if entry.dtype not in _FLOATS:
            raise UsageError(f"'{names[0]}' is {entry.dtype} in {base}; merge into the 16- or 32-bit model.")
        if not (change.lora_A.isfinite().all() and change.lora_B.isfinite().all()):
            raise UsageError(f"{files.folder} has NaN or infinity in '{change.module}'; take an earlier checkpoint.")
    for parameter, tensor in files.whole.items():
        names = layout.stored(parameter)
        if not names:
            raise UsageError(f"{files.folder} holds '{parameter}', which {base} does not have.")
        if any(layout.pieces[name].cut(tensor).shape != entries[name].shape for name in names):
            raise UsageError(f"{files.folder} holds '{parameter}' in another shape than {base}.")


def _make_tensor(
    name: str,
    entry: _Entry,
    piece: Piece | None,
    changes: Mapping[str, _Change],
    files: AdapterFiles,
    dtype: torch.dtype | None,
    device: str,
) -> Tensor:
    target = entry.dtype_after(dtype)
    change = changes.get(piece.parameter) if piece else None
    if piece and piece.parameter in files.whole:
        tensor = piece.cut(files.whole[piece.parameter]).contiguous()
    else:
        tensor = entry.file.get_tensor(entry.name)
        if entry.name != name:  # a tied one: safetensors refuses to write one memory twice
            tensor = tensor.clone()
    if piece and change:
        tensor = change.apply(tensor.to(device), piece)
    elif target == tensor.dtype:
        return tensor
    result = tensor.to(target)
    if not torch.equal(result.isfinite(), tensor.isfinite()):
        raise LoryError(f"'{name}' has values too large for {target}; merge with dtype bfloat16 or float32.")
    return result.cpu()


def _write_shard(path: Path, names: list[str], make_tensor: Callable[[str], Tensor]) -> None:
    # a function of its own, so that a shard is freed before the next one is filled
    shard = {name: make_tensor(name) for name in names}
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors keeps the system's error number in its text only
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), str(error)) from error
        raise LoryError(f"Could not write {path}: {error}.") from error
    # safetensors makes files that only their owner can read
    shutil.copymode(path.with_name("config.json"), path)


def _set_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with `dtype` in it, also in its sub-configs and under the older key where these have one."""
    name = str(dtype).removeprefix("torch.")
    return _set_everywhere(config, dtype=name, torch_dtype=name)


def _set_everywhere(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """The config with these values where it or one of its sub-configs has such keys, and the first one on top."""

    def replace(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: values[key] if key in values else replace(item) for key, item in value.items()}

    first = next(iter(values))
    return {**replace(dict(config)), first: values[first]}


def _copy_companions(base: Path, adapter: Path, out: Path) -> None:
    """Copy tokenizer, templates and the like; the adapter's win, since they are what it was trained with."""
    stale = list(_NEVER)
    if (adapter / "tokenizer_config.json").exists():
        # transformers lets these files override tokenizer_config.json, so the base's must not meet the adapter's
        stale += ["special_tokens_map*", "added_tokens*"]
        if any(adapter.glob("chat_template*")) or read_json(adapter / "tokenizer_config.json").get("chat_template"):
            stale.append("chat_template*")
    for folder, wanted, unwanted in ((base, _FROM_BASE, tuple(stale)), (adapter, _FROM_ADAPTER, ())):
        for path in sorted(folder.iterdir()):
            if path.is_file() and _matches(path, wanted) and not _matches(path, unwanted):
                shutil.copyfile(path, out / path.name)


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)
