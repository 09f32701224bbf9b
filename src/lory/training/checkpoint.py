"""Checkpoints: whole or absent, with everything that the next step depends on; nothing in them is pickled.

Training state is written between optimizer steps only, so there is never a half-filled accumulation window to store.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lory.adapters.kinds import Kind
from lory.data.vision.reader import ImageReader
from lory.models.resolve import list_checkpoints
from lory.runtime import LoryError, UsageError, flush, hash_file, read_json, write_aside, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "MANIFEST.json"
STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"


@dataclass
class Position:
    """Where a run stands, between two optimizer steps."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    """Of a stream: in its window."""
    window: int = 0
    """Of a stream: which of its windows this is."""
    window_starts: tuple[int, ...] = ()
    """Of a stream: for each source, the record at which the window starts."""
    best_loss: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0


@dataclass
class Parts:
    """What a checkpoint is made of."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    """Where the base model is to be found, for the adapter's config."""
    kind: Kind
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    accelerator: Accelerator
    reader: ImageReader | None = None
    """What prepares images, of a model that sees."""
    processor_folder: Path | None = None
    """Where its processor was loaded from."""


def save_checkpoint(run: Path, parts: Parts, position: Position) -> Path:
    """Write ``checkpoint-<step>`` of a run: aside first, its manifest last, then renamed into place.

    Called by all ranks; the first one writes.

    Raises:
        LoryError: it could not be written, for want of space, say; what was there before is untouched.
    """
    folder = run / f"checkpoint-{position.step}"
    rng = _gather_rng(parts.accelerator)
    # after a resume from an older checkpoint a newer one may be there; if it is whole, it has the same content
    if parts.accelerator.is_main_process and not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with write_aside(folder) as aside:
            _write_parts(aside, parts, position, rng)
    parts.accelerator.wait_for_everyone()
    return folder


def _write_parts(folder: Path, parts: Parts, position: Position, rng: dict[str, Tensor]) -> None:
    try:
        parts.kind.save(parts.model, folder, parts.base)
        save_file(_optimizer_tensors(parts.optimizer), folder / OPTIMIZER_FILE)
        save_file(rng, folder / RNG_FILE)
    except SafetensorError as error:
        raise LoryError(f"Could not write the checkpoint in {folder.parent}: {error}.") from error
    parts.tokenizer.save_pretrained(folder)
    if parts.reader is not None:
        parts.reader.save(folder, parts.processor_folder)
    if parts.model.generation_config is not None:
        parts.model.generation_config.save_pretrained(folder)
    write_json(folder / STATE_FILE, _state(parts, position))
    _write_manifest(folder)


def _state(parts: Parts, position: Position) -> dict[str, Any]:
    return {
        "position": asdict(position),
        "schedule": {"last_epoch": parts.schedule.last_epoch},
        "processes": parts.accelerator.num_processes,
        "dtype": str(parts.model.dtype),
    }


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(folder / MANIFEST, {"sha256": {path.name: hash_file(path) for path in files}})


def check_manifest(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        UsageError: a file is missing or was changed.
    """
    for name, expected in read_json(folder / MANIFEST)["sha256"].items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise UsageError(f"{folder} lacks {name}, which its {MANIFEST} lists; resume from another checkpoint.")
        if hash_file(path) != expected:
            raise UsageError(f"{path} is not what its {MANIFEST} says (SHA-256); resume from another checkpoint.")


def _is_whole(folder: Path) -> bool:
    try:
        check_manifest(folder)
    except UsageError:
        return False
    return True


def point_link(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, replacing an old one at once."""
    aside = link.with_name(f".{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name, target_is_directory=True)
    os.replace(aside, link)
    flush(link.parent)


def tidy_checkpoints(run: Path, position: Position, keep: int) -> None:
    """Point `last` and `best` at their checkpoints and delete the others but the newest `keep` and this position's.

    Due after a save, and again when a run is resumed, since the save may have been interrupted on its way here.
    """
    checkpoints = list_checkpoints(run)
    point_link(run / "last", checkpoints[-1])
    best, current = (run / f"checkpoint-{step}" for step in (position.best_step, position.step))
    if best in checkpoints:
        point_link(run / "best", best)
    elif not (run / "best").exists():
        (run / "best").unlink(missing_ok=True)
    for folder in checkpoints[:-keep]:
        if folder not in (best, current):
            # under a name that the lines below know, should the deletion be interrupted
            folder.rename(run / f".{folder.name}.old.tmp")
    for left in run.glob(".checkpoint-*.tmp"):
        shutil.rmtree(left)


def drop_newer(run: Path, position: Position) -> None:
    """Delete the checkpoints after this position, which the run will make again; the log is taken back alike."""
    for folder in list_checkpoints(run):
        if int(folder.name.rpartition("-")[2]) > position.step:
            folder.rename(run / f".{folder.name}.old.tmp")
            shutil.rmtree(run / f".{folder.name}.old.tmp")


def load_checkpoint(folder: Path, parts: Parts) -> Position:
    """Put adapter, optimizer, schedule and random generators back to where the checkpoint was written.

    Raises:
        UsageError: the checkpoint is damaged, or was written by another number of processes.
    """
    check_manifest(folder)
    state = read_json(folder / STATE_FILE)
    if state["processes"] != parts.accelerator.num_processes:
        raise UsageError(
            f"{folder} was written by {state['processes']} processes, and this run has "
            f"{parts.accelerator.num_processes}; resume with the same number."
        )
    if state["dtype"] != str(parts.model.dtype):
        raise UsageError(
            f"{folder} was trained in {state['dtype']}, and here model.dtype gives {parts.model.dtype}; resume on the "
            "same kind of device."
        )
    parts.kind.restore(parts.model, folder)
    _load_optimizer(load_file(folder / OPTIMIZER_FILE), parts.optimizer)
    _load_schedule(parts.schedule, state["schedule"]["last_epoch"])
    _restore_rng(load_file(folder / RNG_FILE), parts.accelerator)
    return Position(**{**state["position"], "window_starts": tuple(state["position"]["window_starts"])})


def _load_schedule(schedule: LRScheduler, last_epoch: int) -> None:
    # the rate is a function of the step alone, so the step is all there is to restore
    schedule.last_epoch = last_epoch
    rates = [base * rate(last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat names: ``<parameter number>.<value>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, values in state.items()
        for name, value in values.items()
    }


def _load_optimizer(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _gather_rng(accelerator: Accelerator) -> dict[str, Tensor]:
    """The state of torch's generators, which are the only ones training draws from; (ranks, bytes) each."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {
        name: accelerator.gather(state[None].to(accelerator.device)).cpu().contiguous()
        for name, state in states.items()
    }


def _restore_rng(states: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    # a copy: of a part of a tensor, torch reads what stands at the whole one's beginning and beyond its end
    own = {name: state[accelerator.process_index].clone() for name, state in states.items()}
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], accelerator.device)
