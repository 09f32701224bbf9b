"""A run: from a config to trained weights in a folder of its own, or on from one of its checkpoints."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.adapters.encoders import PromptConfig
from lory.adapters.files import CONFIG_FILE as ADAPTER_FILE
from lory.adapters.inject import AdapterConfig, Match
from lory.adapters.kinds import KINDS, attach
from lory.adapters.lint import lint_adapter
from lory.adapters.virtual_tokens import find_leading
from lory.assistant import load_reader
from lory.config import apply_overrides, build
from lory.data.encoding.named_templates import AUTO, add_answer_end, choose_template
from lory.data.encoding.templates import NO_TEMPLATE
from lory.data.mixture.collate import collate
from lory.data.mixture.dataset import DataConfig, Dataset, build_dataset
from lory.data.mixture.packing import efficiency
from lory.data.vision.reader import ImageReader
from lory.models.attention import keeps_documents_apart
from lory.models.fp8 import check_fp8, hold_in_fp8
from lory.models.fused_memory import keep_freed_memory
from lory.models.kernels import choose_kernels
from lory.models.load import (
    default_device,
    find_processor_folder,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    terminators,
)
from lory.models.matmul import choose_fp32_matmul
from lory.models.resolve import Resolved, find_checkpoint, find_run, fingerprint_weights, list_checkpoints, resolve
from lory.runtime import UsageError, lock_file, log
from lory.training.checkpoint import Parts, Position, drop_newer, load_checkpoint
from lory.training.config import Config, read_config
from lory.training.feed import Batching, Feed, SampleFeed, SeeingFeed, StreamFeed
from lory.training.folder import check_output, check_resumable, describe_run, make_folder
from lory.training.loop import Loop
from lory.training.monitor import Monitor, rewind
from lory.training.objective import Objective
from lory.training.optim import build_optimizer, build_schedule
from lory.training.plan import Plan, count_steps, plan_rows
from lory.training.plots import plot_runs
from lory.training.sight import Sight, open_sight

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A config whose model has been found and whose data has been read, before any weight is loaded."""

    config: Config
    resolved: Resolved
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    terminators: tuple[int, ...]
    """Token ids that end an answer."""
    reader: ImageReader | None = None
    """What prepares images, of a model that sees."""

    def plan(self, processes: int = 1) -> Plan:
        """Which samples are learnt together."""
        data, train = self.config.data, self.config.train
        leading = getattr(self.config.adapter, "virtual_tokens", 0)
        rows = plan_rows(self.dataset.train, data.packing, data.max_tokens, leading)
        return Plan(rows, train.batch_size, train.accumulate, processes, train.seed)

    def report(self, plan: Plan) -> dict[str, Any]:
        """data.json: what became of every source, and how its samples are laid out."""
        tokens, capacity = int(self.dataset.train.lengths.sum()), self.config.data.max_tokens
        share = efficiency(tokens, len(plan.rows), capacity) if self.config.data.packing else None
        return {
            **self.dataset.report(),
            "base": fingerprint_weights(self.resolved.base_path),
            "rows": len(plan.rows),
            "packing_efficiency": share,
            "steps": count_steps(self.config.train, plan, self.config.data.streaming),
        }


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind."""

    folder: Path
    steps: int
    best_step: int | None
    best_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**vars(self), "folder": str(self.folder)}


def prepare(config: Config) -> Prepared:
    """Find the model, read and encode the data.

    Raises:
        UsageError: no such model, bad data, or nothing to learn.
    """
    resolved = resolve(config.model.path)
    if resolved.adapter:
        raise UsageError(
            f"model.path is '{config.model.path}', which carries an adapter; merge it first (lory merge "
            f"{config.model.path} OUT) and train on the merged model, or go on with that run by --resume."
        )
    tokenizer = load_tokenizer(resolved, config.model.trust_remote_code)
    trust = config.model.trust_remote_code
    model_type = load_config(resolved.base_path, trust).model_type
    named = config.model.template, resolved.name, model_type
    # plain texts need no template, so one that is missing is an error only where messages come
    if tokenizer.chat_template or config.model.template != AUTO:
        for note in choose_template(tokenizer, *named):
            log.info("note: %s", note)
    ends = add_answer_end(terminators(load_generation_config(resolved, trust), tokenizer), tokenizer)
    reader = _prepare_reader(config, resolved, tokenizer)
    try:
        dataset = build_dataset(config.data, tokenizer, ends, config.train.seed, reader)
    except UsageError as error:
        if not tokenizer.chat_template and NO_TEMPLATE in str(error):
            choose_template(tokenizer, *named)  # says which there are
        raise
    _check_images(config, dataset)
    return Prepared(config, resolved, tokenizer, dataset, ends, reader)


def _prepare_reader(config: Config, resolved: Resolved, tokenizer: PreTrainedTokenizerBase) -> ImageReader | None:
    """What prepares the images of a model that sees, resized as the config asks."""
    reader = load_reader(resolved, tokenizer, config.model.trust_remote_code)
    data = config.data
    asked = {"max_pixels": data.max_pixels, "min_pixels": data.min_pixels, "size_factor": data.size_factor}
    given = {name: value for name, value in asked.items() if value is not None}
    if reader is None or not given:
        return reader
    return ImageReader(reader.processor, replace(reader.resizing, **given))


def _check_images(config: Config, dataset: Dataset) -> None:
    """Refuse what works for texts only, where there are images."""
    samples = [dataset.train, *dataset.eval.values()]
    if not any(store.image_counts.any() for sample in samples for store in sample.stores):
        return
    loss = config.loss
    for field, is_set in (
        ("loss.unlikelihood.sequence_rate", loss.unlikelihood.sequence_rate),
        ("loss.embedding_noise", loss.embedding_noise),
    ):
        if is_set:
            raise UsageError(f"{field} is {is_set:g}, which does not go with images yet; set it to 0.")


def train(
    config: Config | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), resume: str | None = None
) -> RunResult:
    """Train as `config` says.

    Args:
        config: a `Config`, its values as a mapping, a YAML file, a bundled config's name, or a run's folder.
        overrides: ``section.field=value`` each.
        resume: `last`, `best` or a checkpoint's name: go on from there, in the run's own folder, exactly as if it had
            never stopped.

    Raises:
        UsageError: wrong config or data, or a resumption that would not be true.
        LoryError: it failed while running, or was interrupted (then a checkpoint was written).
    """
    from accelerate import Accelerator

    run: Path | None = None
    if isinstance(config, str | Path):
        config, run = read_config(config, overrides)
    elif not isinstance(config, Config):
        config = build(Config, apply_overrides(config, overrides), "config")
    accelerator = Accelerator(cpu=default_device().type == "cpu")
    check_output(Path(config.output))
    prepared = prepare(config)
    plan = prepared.plan(accelerator.num_processes)
    report = prepared.report(plan)
    with contextlib.ExitStack() as stack:
        if resume:
            folder = run or find_run(Path(config.output))
            stack.enter_context(_lock(folder, accelerator))
            check_resumable(folder, config, report)
        # a run that cannot start leaves no folder behind, so its own is made after the model has been built
        built = _build(prepared, plan, accelerator)
        log.info("%s", summarise(prepared, built.matches, report))
        if not resume:
            folder = _open_folder(config, report, accelerator)
            stack.enter_context(_lock(folder, accelerator))
        return _train_in(folder, prepared, plan, built, resume)


@dataclass(frozen=True)
class _Built:
    """A model with its adapter and everything that updates it."""

    parts: Parts
    objective: Objective
    matches: list[Match]
    padded: bool
    sight: Sight | None = None


def _build(prepared: Prepared, plan: Plan, accelerator: Accelerator) -> _Built:
    from accelerate.utils import set_seed

    config = prepared.config
    log.info("%s", choose_fp32_matmul(accelerator.device))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(config.train.seed)
    model, matches = build_model(prepared, accelerator)
    if model.generation_config:
        # what is trained to end an answer has to end it wherever the checkpoint is served
        model.generation_config.eos_token_id = list(prepared.terminators)
    padded = _must_pad(model, config.data)
    sight = _open_sight(model, prepared)
    kernels = choose_kernels(config.train.kernels, accelerator.device)
    objective = Objective(model, config.loss, sight=sight, kernels=kernels)
    ratio = config.adapter.lora_plus_ratio if isinstance(config.adapter, AdapterConfig) else None
    optimizer = build_optimizer(model, config.train, ratio)
    schedule = build_schedule(optimizer, config.train, count_steps(config.train, plan, config.data.streaming))
    kind = KINDS[config.adapter.type]
    parts = Parts(model, prepared.tokenizer, prepared.resolved.base, kind, optimizer, schedule, accelerator)
    if prepared.reader is not None:
        parts.reader, parts.processor_folder = prepared.reader, find_processor_folder(prepared.resolved)
    return _Built(parts, objective, matches, padded, sight)


def _open_sight(model: PreTrainedModel, prepared: Prepared) -> Sight | None:
    """What images go through, where the model sees; measured on the first sample that has one."""
    if prepared.reader is None:
        return None
    config, samples = prepared.config, prepared.dataset.train
    if isinstance(config.adapter, PromptConfig):
        raise UsageError(f"adapter.type is {config.adapter.type}, which does not go with a model that sees; use lora.")
    sight = open_sight(model, prepared.reader, config.data.image_cache_gb)
    seen = next((number for number, count in enumerate(samples.image_counts) if count), None)
    if seen is not None and not sight.speed_up(collate([samples[seen]], not config.data.packing)):
        raise UsageError(
            f"{type(model).__name__} computes something with images that lory does not know yet; it cannot be trained."
        )
    return sight


def _open_folder(config: Config, report: dict[str, Any], accelerator: Accelerator) -> Path:
    """A new run's folder, which the first rank makes and all know."""
    from accelerate.utils import broadcast_object_list

    names = [""]
    if accelerator.is_main_process:
        folder = make_folder(Path(config.output))
        describe_run(folder, config, report, accelerator.num_processes)
        names = [str(folder)]
    return Path(broadcast_object_list(names)[0])


def _lock(folder: Path, accelerator: Accelerator) -> contextlib.AbstractContextManager[None]:
    if not accelerator.is_main_process:
        return contextlib.nullcontext()
    in_use = f"{folder} is in use by another training; wait until it has ended."
    return lock_file(folder / ".lock", wait=False, in_use=in_use)


def _train_in(folder: Path, prepared: Prepared, plan: Plan, built: _Built, resume: str | None) -> RunResult:
    config, parts = prepared.config, built.parts
    accelerator = parts.accelerator
    position = _find_position(folder, resume, parts)
    with contextlib.ExitStack() as stack:
        monitor = None
        total, every = count_steps(config.train, plan, config.data.streaming), config.train.log_every_steps
        if accelerator.is_main_process:
            monitor = stack.enter_context(Monitor(folder, total, position.step, every))
        several = accelerator.num_processes > 1
        objective = accelerator.prepare_model(built.objective) if several else built.objective
        batching = _choose_batching(config, parts, built.padded)
        dataset = prepared.dataset
        feed: Feed
        if dataset.stream:
            feed = StreamFeed(dataset.stream, plan, batching, total)
        else:
            feed = SampleFeed(dataset.train, plan, batching, total)
        if built.sight is not None:
            feed = SeeingFeed(feed, built.sight)
            stack.callback(built.sight.close)
            stack.callback(feed.close)
        loop = Loop(folder, config, objective, parts, feed, batching, dataset.eval, prepared.terminators, monitor)
        loop.run(position)
    if accelerator.is_main_process:
        plot_runs([folder], folder / "plots")
        if (folder / "last" / ADAPTER_FILE).exists():
            for line in lint_adapter(folder / "last"):
                log.info("note: %s", line)
    return RunResult(folder, position.step, position.best_step, position.best_loss)


def _choose_batching(config: Config, parts: Parts, padded: bool) -> Batching:
    data = config.data
    leading = find_leading(parts.model, packed=not padded)
    pad_id = parts.tokenizer.pad_token_id or 0
    return Batching(padded, pad_id, leading, data.packing, data.max_tokens, data.duplicates == "fold")


def build_model(prepared: Prepared, accelerator: Accelerator) -> tuple[PreTrainedModel, list[Match]]:
    """The base model with a fresh adapter."""
    config = prepared.config
    base = config.model
    if base.fp8:
        check_fp8(accelerator.device)
    model = load_model(prepared.resolved, base.dtype, accelerator.device, base.trust_remote_code, base.quantize)
    matches = attach(model, config.adapter, prepared.tokenizer)
    if base.fp8:
        hold_in_fp8(model)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, matches


def _must_pad(model: PreTrainedModel, data: DataConfig) -> bool:
    """Whether batches have to be padded, since the model cannot keep documents in one row apart."""
    if keeps_documents_apart(model, data.max_tokens):
        return False
    if data.packing:
        raise UsageError(
            f"{type(model).__name__} cannot keep packed samples apart (they would see each other); set data.packing to "
            "false."
        )
    log.warning("%s needs padded batches, which cost time on short samples.", type(model).__name__)
    return True


def _find_position(folder: Path, resume: str | None, parts: Parts) -> Position:
    if not resume:
        return Position()
    if resume == "last" and not list_checkpoints(folder):
        log.warning("%s has no checkpoint yet, so it starts from the beginning.", folder)
        if parts.accelerator.is_main_process:
            rewind(folder, -1)
        return Position()
    checkpoint = find_checkpoint(folder, resume)
    position = load_checkpoint(checkpoint, parts)
    if parts.accelerator.is_main_process:
        drop_newer(folder, position)
    log.info("Going on from %s, after step %d.", checkpoint, position.step)
    return position


def summarise(prepared: Prepared, matches: Sequence[Match], report: Mapping[str, Any]) -> str:
    """What is about to be trained, in a few lines."""
    names = Counter(match.name.rpartition(".")[2] for match in matches)
    learnt = sum(match.parameters for match in matches)
    lines = [f"{prepared.resolved.name}: {learnt:,} trained parameters in {len(matches)} layers ("]
    lines[0] += ", ".join(f"{name} x {count}" for name, count in names.items()) + ")"
    lines += [f"  {line}" for line in describe_sources(report)]
    packed = report["packing_efficiency"]
    full = f", {packed:.1%} full" if packed is not None else ""
    lines.append(f"  {report['rows']:,} rows{full}, {report['steps']:,} optimizer steps")
    return "\n".join(lines)


def describe_sources(report: Mapping[str, Any]) -> list[str]:
    """What became of each source, line by line."""
    lines = []
    for source in report["sources"]:
        if source.get("streamed"):
            lines.append(f"{source['name']}: streamed, {source['read_so_far']:,} read for the first window")
        else:
            lines.append(_count_source(source))
        lines += [f"  dropped {count:,}: {reason}" for reason, count in source["dropped"].items()]
        lines += [f"  note: {note}" for note in source["notes"]]
    return lines


def _count_source(source: Mapping[str, Any]) -> str:
    samples = source["samples"]
    images = f", {source['images']:,} images" if source["images"] else ""
    return (
        f"{source['name']}: {source['read']:,} read, {samples['train']:,} to train on, {samples['eval']:,} to "
        f"evaluate on, {source['tokens']:,} tokens, {source['supervised_tokens']:,} learnt{images}"
    )
