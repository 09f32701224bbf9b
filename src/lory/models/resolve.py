"""What a MODEL argument means: a run, a checkpoint, an adapter folder, a model folder, a hub id, or `smollm2`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lory.models import embedded
from lory.runtime import UsageError, log, read_json

_ADAPTER_FILE = "adapter_config.json"
_MODEL_FILE = "config.json"
_MANIFEST = "MANIFEST.json"
_END_BYTES = 2**22
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Resolved:
    """Where a model's parts are."""

    name: str
    """As the user wrote it."""
    base: str
    """As an adapter's config names it: `smollm2`, a folder or a hub id."""
    base_path: Path
    """A folder with config.json and the weights."""
    adapter: Path | None
    """A folder in PEFT's format."""

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer saved with the adapter is the one that was trained with."""
        if self.adapter and (self.adapter / "tokenizer_config.json").exists():
            return self.adapter
        return self.base_path


def resolve(model: str | Path) -> Resolved:
    """Find the parts that MODEL means.

    Raises:
        UsageError: there is no such thing; the sentence says what was looked for.
    """
    name = str(model)
    if name == embedded.NAME:
        return Resolved(name, name, embedded.prepare_smollm2(), None)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _resolve_folder(name, folder)
    if folder.exists():
        raise UsageError(f"'{name}' is a file; a model is a folder, a hub id, or '{embedded.NAME}'.")
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
        return Resolved(name, name, _download(name), None)
    raise UsageError(
        f"'{name}' is no folder here and no hub id (owner/name); give a run, a checkpoint, an adapter or model folder, "
        f"a hub id, or '{embedded.NAME}'."
    )


def _resolve_folder(name: str, folder: Path) -> Resolved:
    if (folder / _ADAPTER_FILE).exists():
        return _resolve_adapter(name, folder)
    if (folder / _MODEL_FILE).exists():
        return Resolved(name, str(folder.resolve()), folder, None)
    return _resolve_folder(name, find_checkpoint(_find_trained_run(folder)))


def _resolve_adapter(name: str, folder: Path) -> Resolved:
    config = read_json(folder / _ADAPTER_FILE)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UsageError(f"{folder / _ADAPTER_FILE} does not name its base model (base_model_name_or_path).")
    base_folder = Path(base).expanduser()
    if base_folder.is_dir() and base_folder.resolve() == folder.resolve():
        raise UsageError(f"{folder / _ADAPTER_FILE} names its own folder as the base model.")
    # looked at before going on from there, lest adapters on each other lead round in a circle
    if (base_folder / _ADAPTER_FILE).exists() or (below := resolve(base)).adapter:
        raise UsageError(f"{folder} is an adapter on '{base}', which is an adapter itself; merge that one first.")
    return Resolved(name, base, below.base_path, folder)


def fingerprint_weights(folder: Path) -> str:
    """SHA-256 that tells a model folder's weights from others: of names, sizes, and both ends of each file.

    The ends hold the names and shapes of all tensors and a million of their values: enough to see another model, or
    another state of this one, in a moment, whatever the size.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(size - _END_BYTES, 0))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def list_runs(folder: Path) -> list[Path]:
    """The run folders (``v0-...``, ``v1-...``) in an output folder, oldest first."""
    numbered = [(re.match(r"v(\d+)-", path.name), path) for path in folder.glob("v*-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def find_run(folder: Path) -> Path:
    """`folder` itself when it is a run's folder, else the newest run in it."""
    if (folder / "config.yaml").exists():
        return folder
    # config.yaml is the last that a new run writes before it starts: without it, it was killed on the way
    runs = [run for run in list_runs(folder) if (run / "config.yaml").exists()]
    if not runs:
        raise UsageError(
            f"{folder} holds no {_ADAPTER_FILE}, no {_MODEL_FILE} and no run; give a run, a checkpoint, an adapter "
            "folder or a model folder."
        )
    return runs[-1]


def _find_trained_run(folder: Path) -> Path:
    """The newest run that has a checkpoint; where none has, the newest."""
    newest = find_run(folder)
    trained = [run for run in list_runs(folder) if list_checkpoints(run)]
    return newest if newest == folder or not trained else trained[-1]


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one without a manifest is not a checkpoint."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*")]
    whole = [(int(match[1]), path) for match, path in numbered if match and (path / _MANIFEST).exists()]
    return [path for _, path in sorted(whole)]


def find_checkpoint(run: Path, which: str = "last") -> Path:
    """A run's checkpoint: `last`, `best`, or its name (``checkpoint-500``)."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise UsageError(f"{run} has no whole checkpoint yet; let it train up to one, or resume it with --resume last.")
    if which == "last":
        return checkpoints[-1]
    if which == "best" and (run / "best").exists():
        return (run / "best").resolve()
    if which == "best":
        raise UsageError(f"{run} has no best checkpoint, since it was not evaluated; use 'last'.")
    for checkpoint in checkpoints:
        if checkpoint.name == which:
            return checkpoint
    there = ", ".join(checkpoint.name for checkpoint in checkpoints)
    raise UsageError(f"{run} has no whole '{which}'; there are: {there}.")


def _download(hub_id: str) -> Path:
    """A model's snapshot from the Hugging Face hub, or from its cache when the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # no pickles, no code: what is not here is not needed to load a model
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    log.info("Fetching %s from the hub ...", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except GatedRepoError as error:
        raise UsageError(
            f"'{hub_id}' is gated: accept its terms on the hub and log in with 'hf auth login'."
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"'{hub_id}' is not on the hub, or is private; check the name or 'hf auth login'.") from error
    except HFValidationError as error:
        raise UsageError(f"'{hub_id}' is no folder here, and no name that the hub allows.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise UsageError(
            f"'{hub_id}' is no folder here, and the hub could not be reached to fetch it; check the name and the "
            f"network, or give a local folder or '{embedded.NAME}'."
        ) from error
