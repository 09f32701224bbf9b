"""lory turns an open language model into your own assistant.

``lory.train(config)``, ``lory.load(MODEL)`` and ``lory.lora`` are the way in from Python; everything is imported when
it is first used, so that ``import lory`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lory.assistant import load
    from lory.training.run import train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]

_HOMES = {"load": "lory.assistant", "train": "lory.training.run"}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "lora":
        return importlib.import_module("lory.lora")
    raise AttributeError(f"module 'lory' has no attribute '{name}'")
