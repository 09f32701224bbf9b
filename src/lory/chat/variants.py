"""Several assistants over one copy of the base weights: the base as it is, and with each of some adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lory.adapters import kinds
from lory.assistant import Assistant, load, load_reader
from lory.models.lean import NAME as DECODER
from lory.models.load import DtypeName, load_tokenizer
from lory.models.quantize import Quantization
from lory.models.resolve import Resolved, resolve
from lory.runtime import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = "base"
"""What the base of a MODEL with an adapter is called."""


class Loading(TypedDict, total=False):
    """The arguments of `lory.assistant.load` after the model."""

    dtype: DtypeName
    device: str | None
    trust_remote_code: bool
    quantize: Quantization | None


def open_variants(model: str | Path, adapters: Mapping[str, str], loading: Loading) -> dict[str, Assistant]:
    """MODEL first, then its base where it has an adapter, then `adapters` (a path by name), each ready to answer.

    What is a whole model rather than an adapter on the same base is loaded beside it.

    Raises:
        UsageError: one of them is not there or does not fit, or two have one name.
    """
    resolved = resolve(model)
    name = resolved.name.rstrip("/").rpartition("/")[2] or resolved.name
    own = {name: str(model), BASE: resolved.base} if resolved.adapter else {name: str(model)}
    if taken := own.keys() & adapters.keys():
        raise UsageError(f"--adapter names '{min(taken)}', as MODEL is called already; choose another name.")
    # a base of int8 on a CPU has its adapter rounded in
    if not (resolved.adapter or adapters) or loading.get("quantize") == "int8":
        return {title: load(path, **loading) for title, path in (own | dict(adapters)).items()}
    base = load(resolved.base, **loading)
    found = {title: resolve(path) for title, path in (own | dict(adapters)).items()}
    return {title: _open(base, resolved.base_path, other, loading) for title, other in found.items()}


def _open(base: Assistant, base_path: Path, resolved: Resolved, loading: Loading) -> Assistant:
    if resolved.base_path.resolve() != base_path.resolve():
        return load(resolved.name, **loading)
    if resolved.adapter is None:
        return base
    return add_adapter(base, resolved, loading.get("trust_remote_code", False))


def add_adapter(base: Assistant, resolved: Resolved, trust_remote_code: bool = False) -> Assistant:
    """An assistant with the adapter of `resolved` over the weights of `base`, which stays as it is.

    Raises:
        UsageError: the adapter was made for another model.
    """
    if resolved.adapter is None:
        raise UsageError(f"'{resolved.name}' is no adapter; give the folder of an adapter, a checkpoint or a run.")
    model = share_weights(base.model)
    tokenizer = load_tokenizer(resolved, trust_remote_code)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"The tokenizer of '{resolved.name}' has {len(tokenizer)} tokens and the model {rows}; merge it with "
            "`lory merge`, and talk to the result."
        )
    kinds.load(model, resolved.adapter)
    return Assistant(model.eval(), tokenizer, resolved.name, load_reader(resolved, tokenizer, trust_remote_code))


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules over the same parameters: what is put on the copy leaves the model alone.

    Buffers, which are small and may be written into, are copied.
    """
    memo: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    # the decoder is one of the model's own layers alone; the copy has none
    decoder = model.__dict__.get(DECODER)
    twin = copy.deepcopy(model, memo | {id(decoder): None})
    twin.__dict__.pop(DECODER, None)
    return twin
