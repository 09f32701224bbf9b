"""What `lory convert` does: looks at what it is given, and calls the way from there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lory.adapters.arithmetic import Mode, combine
from lory.adapters.checkpoints import (
    DEFAULT_SHARD_BYTES,
    Weights,
    convert_lora_checkpoint,
    convert_model_checkpoint,
    holds_lora,
    parse_rename,
    read_weights,
)
from lory.adapters.factors import Adapter
from lory.adapters.files import CONFIG_FILE
from lory.adapters.lint import lint_adapter
from lory.adapters.loralib import (
    EMBEDDINGS,
    Layout,
    Slices,
    check_alpha,
    holds_loralib,
    loralib_to_peft,
    parse_kernel,
    peft_to_loralib,
)
from lory.runtime import UsageError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `lory convert` can be told; which of it means something depends on what is converted."""

    alpha: float | None = None
    """The LoRA alpha that the layers were, or are to be, built with."""
    base: str | None = None
    """The base model: its name for an adapter's config, or where a whole model's config is from."""
    rename: Sequence[str] = ()
    """``OLD=NEW``, OLD a regular expression."""
    ignore: Sequence[str] = ()
    """Regular expressions of tensors to leave out."""
    merged: Sequence[str] = ()
    """``NAME=SLICES`` of the layers that are loralib's MergedLinear (see `Slices`)."""
    conv: Sequence[str] = ()
    """``NAME=KERNEL`` of loralib's convolutions, as in ``conv1=3x3``."""
    embedding: str | None = None
    """A regular expression of the layers that are loralib's embeddings."""
    fan_in_fan_out: bool = False
    """The model's linear layers store (in, out), as GPT-2's do."""
    save_module: Sequence[str] = ()
    """Modules that were trained whole."""
    adapter_name: str | None = None
    """Which of several adapters in a checkpoint."""
    mode: Mode | None = None
    """How adapters are added up."""
    even: bool = False
    """Give all layers the same rank and alpha."""
    fp32: bool = False
    """Store a model's weights as fp32."""
    max_shard_bytes: int | None = None
    """Largest file of a model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model, which only one without weights needs."""

    def check(self, way: str, *wanted: str) -> None:
        """Refuse an option that was given and means nothing here."""
        for field in fields(self):
            if getattr(self, field.name) != field.default and field.name not in wanted:
                option = "max-shard-size" if field.name == "max_shard_bytes" else field.name.replace("_", "-")
                raise UsageError(f"--{option} means nothing when converting {way}; leave it out.")

    def layout(self) -> Layout:
        """What was said about loralib's layers."""
        merged = _parse_table(self.merged, Slices.parse, "--merged")
        return Layout(merged, _parse_table(self.conv, parse_kernel, "--conv"), self.embedding or EMBEDDINGS)

    def need_alpha(self, where: Path) -> float:
        """The alpha, which a file does not hold."""
        if self.alpha is None:
            raise UsageError(f"{where} does not hold the LoRA alpha it was trained with; give it with --alpha.")
        check_alpha(self.alpha)
        return self.alpha


@dataclass(frozen=True)
class Conversion:
    """What was made of what."""

    out: Path
    way: str
    """From what to what, in words."""
    layers: int
    """Adapted layers; 0 for a model."""
    ranks: tuple[int, ...]
    """The ranks of the factors written, smallest first."""
    alpha: float | None
    """What loralib's layers must be built with, or the most frequent alpha of an adapter folder."""
    files: int
    """Files of weights."""
    left_out: tuple[str, ...]
    """What lay beside the weights, is made anew by every model, or was asked to be left out."""
    notes: tuple[str, ...]
    """Where vLLM or llama.cpp would not take the adapter, and what to do."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "out": str(self.out)}


def convert(
    sources: Sequence[str],
    out: Path,
    options: Options,
    find_model: Callable[[str], Path] = Path,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Turn adapters and checkpoints into the form that `out` says.

    Args:
        sources: one file of weights, one folder of a checkpoint, or adapter folders, each as ``FOLDER`` or
            ``FOLDER=WEIGHT``.
        out: a folder to write, or a .pt or .safetensors file for loralib's form; it must not exist.
        find_model: gives the folder of the model that `options.base` names.
        progress: called with (done, total) tensors of a model.

    Raises:
        UsageError: what is given cannot be converted, or an option means nothing for it; nothing has been written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another name, or delete it first.")
    given = [_parse_source(source) for source in sources]
    is_file = out.suffix in (".pt", ".safetensors")
    if all((folder / CONFIG_FILE).exists() for folder, _ in given):
        return _convert_to_loralib(given, out, options) if is_file else _add_up(given, out, options)
    if len(given) > 1 or given[0][1] != 1:
        lacking = next(path for path, _ in given if not (path / CONFIG_FILE).exists())
        raise UsageError(f"{lacking} has no {CONFIG_FILE}; only adapter folders can be added up.")
    if is_file:
        raise UsageError(f"{out} is a file, which is loralib's form; only an adapter folder can be written as that.")
    weights = read_weights(given[0][0]).rename([parse_rename(text) for text in options.rename]).ignore(options.ignore)
    if holds_loralib(weights) or holds_lora(weights):
        return _convert_adapter(weights, out, options)
    return _convert_model(weights, out, options, find_model, progress)


def _parse_source(text: str) -> tuple[Path, float]:
    """A path and its weight; a path that exists is taken as it stands, whatever signs are in it."""
    if Path(text).exists():
        return Path(text), 1.0
    path, _, weight = text.rpartition("=")
    if not Path(path).exists() or not path:
        raise UsageError(f"'{path or text}' does not exist; a file or a folder of weights is expected.")
    try:
        return Path(path), float(weight)
    except ValueError as error:
        raise UsageError(f"'{text}' does not exist, and is no FOLDER=WEIGHT either.") from error


def _parse_table(texts: Sequence[str], parse: Callable[[str], T], option: str) -> dict[str, T]:
    table = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals:
            raise UsageError(f"{option} is '{text}'; NAME=VALUE is expected.")
        table[pattern] = parse(value)
    return table


def _convert_to_loralib(given: Sequence[tuple[Path, float]], out: Path, options: Options) -> Conversion:
    way = "an adapter folder into loralib's form"
    options.check(way, "alpha", "rename", "merged")
    if len(given) > 1 or given[0][1] != 1:
        raise UsageError("Several adapters or a weight were given; add them up into a folder first.")
    rules = [parse_rename(text) for text in options.rename]
    state, alpha = peft_to_loralib(given[0][0], out, options.layout(), options.alpha, rules)
    ranks = [tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A")]
    return Conversion(out, way, len(ranks), tuple(sorted(set(ranks))), alpha, 1, (), ())


def _add_up(given: Sequence[tuple[Path, float]], out: Path, options: Options) -> Conversion:
    way = "adapter folders into one"
    options.check(way, "mode", "even")
    return _describe(way, out, combine(given, out, options.mode or "cat", options.even), ())


def _convert_adapter(weights: Weights, out: Path, options: Options) -> Conversion:
    common = ("alpha", "base", "rename", "ignore")
    if holds_loralib(weights):
        way = "loralib's form into an adapter folder"
        options.check(way, *common, "merged", "conv", "embedding", "fan_in_fan_out", "save_module")
        alpha, saved = options.need_alpha(weights.where), options.save_module
        made = loralib_to_peft(weights, out, alpha, options.layout(), options.base, options.fan_in_fan_out, saved)
    else:
        way = "a checkpoint into an adapter folder"
        options.check(way, *common, "adapter_name")
        alpha = options.need_alpha(weights.where)
        made = convert_lora_checkpoint(weights, out, alpha, options.base, options.adapter_name)
    return _describe(way, out, made, weights.left_out)


def _convert_model(
    weights: Weights,
    out: Path,
    options: Options,
    find_model: Callable[[str], Path],
    progress: Callable[[int, int], None] | None,
) -> Conversion:
    way = "a checkpoint into a model folder"
    options.check(way, "base", "rename", "ignore", "fp32", "max_shard_bytes", "trust_remote_code")
    if options.base is None:
        raise UsageError(f"{weights.where} holds a whole model; name the model whose config it has with --base.")
    size = options.max_shard_bytes or DEFAULT_SHARD_BYTES
    base, trust = find_model(options.base), options.trust_remote_code
    files, computed = convert_model_checkpoint(weights, base, out, options.fp32, size, progress, trust)
    return Conversion(out, way, 0, (), None, files, weights.left_out + computed, ())


def _describe(way: str, out: Path, adapter: Adapter, left_out: tuple[str, ...]) -> Conversion:
    layers = adapter.layers.values()
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    ranks = tuple(sorted({layer.rank for layer in layers}))
    return Conversion(out, way, len(layers), ranks, alpha, 1, left_out, tuple(lint_adapter(out)))
