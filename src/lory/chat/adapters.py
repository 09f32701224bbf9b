"""Adapters over one loaded base, of any kind: one of them, or none, answers at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lory.assistant import Assistant, check_device, load
from lory.chat.variants import add_adapter
from lory.models.lean import NAME as DECODER
from lory.models.lean import prepare_for_decoding
from lory.models.load import DtypeName, default_device
from lory.models.quantize import Quantization
from lory.models.resolve import Resolved, resolve
from lory.runtime import UsageError, log


class Adapters:
    """The adapters that a base can have, by name. They share its weights, and are read when they are used.

    Attributes:
        current: the name of the adapter that was used last; None: there was none.
    """

    def __init__(self, assistant: Assistant, base: Resolved, trust_remote_code: bool = False) -> None:
        """`assistant` is the base without an adapter, and `base` says where it was loaded from."""
        self.current: str | None = None
        self._plain, self._base, self._trust = assistant, base, trust_remote_code
        self._known: dict[str, Resolved] = {}

    @property
    def names(self) -> list[str]:
        """The names that `use` takes."""
        return list(self._known)

    def add(self, name: str, model: str | Path) -> None:
        """Give an adapter a name.

        Args:
            model: an adapter's folder, a checkpoint, a run or a hub id.

        Raises:
            UsageError: it is no adapter, or the name belongs to another one.
        """
        found = resolve(model)
        if found.adapter is None:
            raise UsageError(f"'{model}' is a whole model, not an adapter; talk to it with `lory chat {model}`.")
        known = self._known.get(name)
        if known is not None and known.adapter != found.adapter:
            raise UsageError(f"'{name}' is the adapter in {known.adapter} already; choose another name.")
        self._known[name] = found

    def use(self, name: str | None) -> Assistant:
        """The base with this adapter, ready to answer; None: without any. The one before is to be let go of.

        Raises:
            UsageError: there is none of this name, or it does not fit the model.
        """
        assistant = self._plain if name is None else self._open(name)
        # the layout of shared weights that one assistant decodes by is lost to the others, and need not be held
        self._plain.model.__dict__.pop(DECODER, None)
        log.debug("%s", prepare_for_decoding(assistant.model))
        self.current = name
        return assistant

    def _open(self, name: str) -> Assistant:
        if name not in self._known:
            known = ", ".join(self._known) or "none"
            raise UsageError(f"'{name}' is no adapter here; there are: {known}.")
        found = self._known[name]
        assistant = add_adapter(self._plain, found, self._trust)
        if found.base_path.resolve() != self._base.base_path.resolve():
            log.warning("The adapter '%s' was made on '%s'; it fits '%s', too.", name, found.base, self._base.base)
        assistant.name = name
        return assistant


def open_chat(
    model: str | Path,
    adapters: Mapping[str, str] | None = None,
    dtype: DtypeName = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    quantize: Quantization | None = None,
) -> tuple[Assistant, Adapters | None]:
    """Load a MODEL ready to chat, and the adapters that it can be given in place of its own, if it has one.

    Args:
        adapters: names and MODELs of adapters on the same base. They are read when they are used.

    Returns:
        The assistant, and the adapters; None where they cannot be changed: weights in int8 on a CPU have theirs in.

    Raises:
        UsageError: the model cannot be loaded, or one of the adapters is none.
    """
    if "none" in (adapters or {}):
        raise UsageError("An adapter was called 'none', which takes adapters off; give it another name.")
    found = resolve(model)
    place = check_device(device) if device else default_device()
    if quantize == "int8" and place.type == "cpu":
        if adapters:
            raise UsageError(
                "--adapter and int8 on a CPU were given; int8 has one adapter, rounded into it: leave one."
            )
        return load(model, dtype, device, trust_remote_code, quantize), None
    assistant = load(found.base, dtype, device, trust_remote_code, quantize)
    base = Resolved(found.name, found.base, found.base_path, None)
    shelf = Adapters(assistant, base, trust_remote_code)
    for name, path in (adapters or {}).items():
        shelf.add(name, path)
    if found.adapter is None:
        assistant.name = found.name
        return assistant, shelf
    shelf.add(found.name, found.adapter)
    return shelf.use(found.name), shelf
