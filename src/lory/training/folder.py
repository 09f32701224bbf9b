"""A run's folder: made anew, described, and checked before a run goes on in it."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lory.config import build, dump_yaml, read_yaml
from lory.models.load import default_device
from lory.models.resolve import list_runs
from lory.runtime import UsageError, explain_os_error, read_json, write_json, write_text
from lory.training.config import CONFIG_FILE, Config

# Fields that may differ between a checkpoint and its resumption, since what is learnt does not depend on them.
# Evaluations are not among them: the best checkpoint and early stopping come from these.
FREE_FIELDS = (
    "output",
    "samples",
    "data.cache",
    "data.workers",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
)
_PACKAGES = ("lory-llm", "torch", "transformers", "accelerate", "safetensors", "numpy")


def check_output(output: Path) -> None:
    """Refuse, before anything is computed, an output below which no folder can be made."""
    for place in (output, *output.parents):
        if place.exists():
            if not place.is_dir():
                raise UsageError(f"output is '{output}', but {place} is a file; choose another folder.")
            return


def make_folder(output: Path) -> Path:
    """A new run's folder, ``v<number>-<date>-<time>``, in `output`."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        output.mkdir(parents=True, exist_ok=True)
        numbers = [int(run.name[1:].partition("-")[0]) for run in list_runs(output)]
        folder = output / f"v{max(numbers, default=-1) + 1}-{stamp}"
        folder.mkdir()
    except OSError as error:
        raise explain_os_error(error, f"make a run's folder in {output}") from error
    return folder


def describe_run(folder: Path, config: Config, data: dict[str, Any], processes: int) -> None:
    """Write environment.json, data.json and, when all else is there, config.yaml, which makes the folder a run."""
    write_json(folder / "environment.json", describe_environment(processes))
    write_json(folder / "data.json", data)
    write_text(folder / CONFIG_FILE, dump_yaml(config))


def describe_environment(processes: int) -> dict[str, Any]:
    """Versions, device and command line."""
    device = default_device()
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _find_version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_resumable(folder: Path, config: Config, data: dict[str, Any]) -> None:
    """Refuse to go on with a run under a config or on data that would make it another run.

    Raises:
        UsageError: names the field that changed, or the source whose data did.
    """
    # built, so that a field which is newer than the run has its default
    before = _flatten(build(Config, read_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE)).model_dump(mode="json"))
    now = _flatten(config.model_dump(mode="json"))
    for name in sorted({**before, **now}):
        free = any(name == field or name.startswith(f"{field}.") for field in FREE_FIELDS)
        if not free and before.get(name) != now.get(name):
            raise UsageError(
                f"{name} was {before.get(name)!r} in {folder} and is {now.get(name)!r} now, so going on would not be "
                "the same run; take the change back, or train without --resume."
            )
    old = read_json(folder / "data.json")
    if old["base"] != data["base"]:
        raise UsageError(
            f"The base model's weights have changed since {folder} began; put them back, or train without --resume."
        )
    if old["fingerprint"] == data["fingerprint"]:
        return
    changed = [
        source["name"]
        for source, earlier in zip(data["sources"], old["sources"], strict=False)
        if source.get("fingerprint") != earlier.get("fingerprint")
    ]
    what = f"the data of {', '.join(changed)}" if changed else "what the data becomes (tokenizer, template or code)"
    raise UsageError(f"{what} has changed since {folder} began; put it back, or train without --resume.")


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """A nested config as ``a.b`` names; lists count as a whole, but for lists of sections."""
    return dict(_walk(value, name))


def _walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, item in enumerate(value):
            yield from _walk(item, f"{name}.{number}")
    else:
        yield name, value
