"""The whole config of a run, and where it is read from."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from lory.adapters.inject import AdapterConfig
from lory.adapters.kinds import AnyAdapterConfig
from lory.config import Section, apply_overrides, build, parse_yaml, read_yaml
from lory.data.mixture.dataset import DataConfig
from lory.models.load import ModelConfig
from lory.models.resolve import find_run
from lory.runtime import UsageError
from lory.training.objective import LossConfig
from lory.training.optim import TrainConfig
from lory.training.samples import SamplesConfig

CONFIG_FILE = "config.yaml"


class Config(Section):
    """Everything `lory train` is told."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model.")
    adapter: AnyAdapterConfig = Field(default_factory=AdapterConfig, description="What is trained on top of it.")
    data: DataConfig = Field(description="What is learnt from.")
    loss: LossConfig = Field(default_factory=LossConfig, description="What is minimised beside the likelihood.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="How it is learnt.")
    samples: SamplesConfig = Field(default_factory=SamplesConfig, description="Chats shown while it learns.")
    output: str = Field("runs/my-assistant", min_length=1, description="Folder in which each run gets its own folder.")

    @model_validator(mode="after")
    def _check_stream(self) -> Config:
        if self.data.streaming and self.train.max_steps is None:
            raise ValueError("data.streaming needs train.max_steps, since a stream's length is not known before")
        return self


def list_bundled() -> dict[str, str]:
    """The bundled configs: name to text."""
    folder = importlib.resources.files("lory") / "configs"
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): texts[name] for name in sorted(texts)}


def read_config(source: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Path | None]:
    """The config that `source` names, with ``a.b=c`` overrides applied, and the run's folder if it is one.

    Args:
        source: a YAML file, the name of a bundled config, or a run's folder (or the folder its runs are in).

    Raises:
        UsageError: there is no such config, or something in it is wrong.
    """
    values, run = _find_values(source)
    return build(Config, apply_overrides(values, overrides), str(source)), run


def _find_values(source: str | Path) -> tuple[dict[str, Any], Path | None]:
    path = Path(source).expanduser()
    if path.is_dir():
        run = find_run(path)
        return read_yaml(run / CONFIG_FILE), run
    if path.is_file():
        return read_yaml(path), None
    bundled = list_bundled()
    if str(source) in bundled:
        return parse_yaml(bundled[str(source)], f"the bundled config {source}"), None
    there = [*bundled, *(str(near) for near in path.parent.glob("*.y*ml"))] if path.parent.is_dir() else list(bundled)
    near = difflib.get_close_matches(str(source), there, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"bundled ones: {', '.join(bundled)}."
    raise UsageError(f"'{source}' is no YAML file, no run's folder and no bundled config; {hint}")
