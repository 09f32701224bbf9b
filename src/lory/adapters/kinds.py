"""The kinds of adapters, in one table: how each is put on a model, stored, and restored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from lory.adapters import full, prompt
from lory.adapters.encoders import PromptConfig
from lory.adapters.files import load_adapter, restore_adapter, save_adapter
from lory.adapters.full import FreezeConfig, FullConfig
from lory.adapters.inject import AdapterConfig, Match, attach_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Kind:
    """What a run does with one kind of adapter."""

    attach: Callable[[Any, Any, Any], list[Match]]
    """(model, config, tokenizer): freeze the model and put the adapter on it, in place."""
    save: Callable[[Any, Path, str], None]
    """(model, folder, base): write it into an existing folder."""
    restore: Callable[[Any, Path], None]
    """(model, folder): set what `attach` made to what was stored, bit for bit."""


_LORA = Kind(lambda model, config, tokenizer: attach_lora(model, config), save_adapter, restore_adapter)
_PROMPT = Kind(prompt.attach, prompt.save, prompt.load_weights)
_WHOLE = Kind(lambda model, config, tokenizer: full.attach(model, config), full.save, full.load_weights)

KINDS: dict[str, Kind] = {
    "lora": _LORA,
    "dora": _LORA,
    "prompt": _PROMPT,
    "ptuning": _PROMPT,
    "prefix": _PROMPT,
    "full": _WHOLE,
    "freeze": _WHOLE,
}

# config.py leaves tags that begin so out of field names
_TAGS = {"lora": "lora", "dora": "lora", "prompt": "prompt", "ptuning": "prompt", "prefix": "prompt"}


def _find_tag(value: Any) -> str | None:
    kind = value.get("type", "lora") if isinstance(value, dict) else getattr(value, "type", None)
    return f"tagged-{_TAGS.get(kind, kind)}" if kind in KINDS else None


AnyAdapterConfig = Annotated[
    Annotated[AdapterConfig, Tag("tagged-lora")]
    | Annotated[PromptConfig, Tag("tagged-prompt")]
    | Annotated[FullConfig, Tag("tagged-full")]
    | Annotated[FreezeConfig, Tag("tagged-freeze")],
    Discriminator(
        _find_tag,
        custom_error_type="unknown_adapter",
        custom_error_message=f"adapter.type should be one of {', '.join(KINDS)}",
    ),
]


def attach(
    model: PreTrainedModel,
    config: AdapterConfig | PromptConfig | FullConfig | FreezeConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Match]:
    """Freeze `model` and put on it what `config` asks for, in place; returns what is trained.

    Args:
        tokenizer: for soft prompts that start from a text.

    Raises:
        UsageError: nothing matches, or the model cannot have this kind of adapter.
    """
    return KINDS[config.type].attach(model, config, tokenizer)


def load(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter in `folder` on `model`, in place, not to be trained.

    Raises:
        UsageError: it was made for another model, or is of a kind that is not known.
    """
    if prompt.is_soft_prompt(folder):
        prompt.load(model, folder)
    else:
        load_adapter(model, folder)
