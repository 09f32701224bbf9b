"""The data section of a config, carried out: sources to conversations to training and evaluation samples."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lory.config import Section
from lory.data.encoding.cache import encode_source
from lory.data.encoding.encode import Encoder, LossOn, OnLong
from lory.data.encoding.pictures import ImageRules
from lory.data.encoding.samples import Samples, count_up
from lory.data.encoding.store import Store
from lory.data.mixture.duplicates import Duplicates, find_first, find_near_duplicates
from lory.data.mixture.mixing import Mixing, mix
from lory.data.mixture.split import HELD_OUT, exclude_questions, split_questions
from lory.data.mixture.stream import Stream
from lory.data.sources.read import SourceConfig
from lory.data.vision.images import ImageLimits
from lory.data.vision.reader import ImageReader
from lory.runtime import UsageError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    Array = np.ndarray[Any, Any]


def _from_environment(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise ValueError(f"the environment's {name} is '{value}', but a whole number of pixels is expected")
    return int(value)


class DataConfig(Section):
    """What is learnt from, and how it becomes tokens."""

    train: list[SourceConfig] = Field(min_length=1, description="Sources to train on.")
    eval: list[SourceConfig] = Field(default=[], description="Sources to evaluate on, in place of eval_fraction.")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the training conversations kept for evaluation."
    )
    max_tokens: int = Field(1024, ge=8, description="Longest sample, and the length of a packed row, in tokens.")
    on_long: OnLong = Field(
        "drop",
        description="What happens to a longer sample: drop, cut_prompt (its answer stays whole), shrink_images (they "
        "are made smaller until it fits) or error.",
    )
    loss_on: LossOn = Field(
        "assistant",
        description="What is learnt: assistant (each answer), last (answer) or all. A weight that a message has goes "
        "before it.",
    )
    packing: bool = Field(True, description="Put several samples into one row of max_tokens, kept apart.")
    duplicates: Duplicates = Field(
        "fold",
        description="What happens to exact duplicates: fold (those of one optimizer step are computed once, with their "
        "number as weight: the same gradient for less work), keep (each is computed) or drop (one is left).",
    )
    mixing: Mixing = Field(
        "concat",
        description="How the sources are mixed: concat (each record once), or by their weights until the first source "
        "has no more (first_exhausted) or until every record was taken (all_exhausted: small sources repeat).",
    )
    streaming: bool = Field(
        False,
        description="Read the training sources while the run goes on, a window at a time, for data larger than memory "
        "or disk; it needs train.max_steps.",
    )
    window_samples: int = Field(
        20_000, ge=1, description="Conversations of a stream that are packed and shuffled together."
    )
    max_pixels: int | None = Field(
        default_factory=lambda: _from_environment("MAX_PIXELS"),
        ge=1,
        description="Images with more pixels are shrunk to so many; null: what the environment's MAX_PIXELS says, else "
        "what the model's processor does.",
    )
    min_pixels: int | None = Field(
        default_factory=lambda: _from_environment("MIN_PIXELS"),
        ge=1,
        description="Images with fewer pixels are enlarged to so many; null: as for max_pixels, with MIN_PIXELS.",
    )
    size_factor: int | None = Field(
        default_factory=lambda: _from_environment("SIZE_FACTOR"),
        ge=1,
        description="Sides of images are made multiples of so many pixels; null: as for max_pixels, with SIZE_FACTOR.",
    )
    image_cache_gb: float = Field(
        20.0,
        ge=0,
        description="Disk for what a frozen vision tower made of the images, so that each is encoded once, in GB; 0 "
        "encodes them in every epoch.",
    )
    fetch_images: bool = Field(
        False, description="Fetch images whose records name them by a web address; otherwise such records are bad."
    )
    cache: bool = Field(True, description="Keep encoded data in lory's cache, for the next run on the same data.")
    workers: int | None = Field(
        None, ge=1, description="Processes that encode; null: one for each core, where there is enough to do."
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.eval and self.eval_fraction:
            raise ValueError("both eval and eval_fraction are given; use one of them")
        weighted = [source.path for source in self.train if source.weight is not None]
        if weighted and self.mixing == "concat":
            raise ValueError(
                f"'{weighted[0]}' has a weight, which mixing: concat leaves aside; set mixing to first_exhausted or "
                "all_exhausted, or remove the weight"
            )
        return self

    @model_validator(mode="after")
    def _check_streaming(self) -> DataConfig:
        if not self.streaming:
            return self
        if self.eval_fraction:
            raise ValueError("eval_fraction needs all data at once, which streaming has not; name sources under eval")
        if self.mixing == "all_exhausted":
            raise ValueError("mixing: all_exhausted needs all data at once, which streaming has not")
        if self.duplicates == "drop":
            raise ValueError("duplicates: drop needs all data at once, which streaming has not; use fold or keep")
        if drawn := [source.path for source in self.train if source.sample]:
            raise ValueError(
                f"'{drawn[0]}' has a sample, for which all of it would be read; use split: train[:N] with streaming"
            )
        return self


@dataclass
class EncodedSource:
    """One source's conversations, encoded, and which of them are used for what."""

    name: str
    config: SourceConfig
    store: Store
    train: Array
    """(conversations) numbers of those that are trained on."""
    eval: Array
    """(conversations) numbers of those that are evaluated on."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Records that are not used, by reason; with those kept they add up to the records that were read (or drawn)."""
    notes: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """The source's part of data.json; lengths are in tokens."""
        import numpy as np

        store = self.store
        used = _expand(store, np.concatenate([self.train, self.eval]))
        lengths = np.sort(store.lengths[used])
        return {
            "name": self.name,
            "path": self.config.path,
            "read": store.summary.read,
            "kept": len(np.unique(np.concatenate([self.train, self.eval]))),
            "dropped": dict(self.dropped),
            "notes": [*store.summary.notes, *self.notes],
            "samples": {"train": len(_expand(store, self.train)), "eval": len(_expand(store, self.eval))},
            "tokens": int(lengths.sum()),
            "supervised_tokens": int(store.supervised[used].sum()),
            "images": int(store.image_counts[used].sum()),
            "lengths": describe_lengths(lengths),
            "fingerprint": store.summary.fingerprint,
        }


def describe_lengths(lengths: Array) -> dict[str, Any] | None:
    """Minimum, median, mean, 95th percentile and maximum of sorted lengths; None if there are none."""
    import numpy as np

    if not len(lengths):
        return None
    return {
        "min": int(lengths[0]),
        "median": float(np.median(lengths)),
        "mean": round(float(lengths.mean()), 1),
        "p95": int(lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]),
        "max": int(lengths[-1]),
    }


@dataclass
class Dataset:
    """Everything a run learns from and is evaluated on."""

    sources: list[EncodedSource]
    train: Samples
    """The training samples of all sources, one source after the other."""
    eval: dict[str, Samples]
    """The evaluation samples by source; sources without any are left out."""
    duplicates: int = 0
    """Training conversations that equal one before them."""
    stream: Stream | None = None
    """Where the training samples come from when they are streamed; `train` is the first window then."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all samples: equal for two runs that learn the same tokens in the same order."""
        digest = hashlib.sha256()
        if self.stream:
            for ids in self.train.each_ids():
                digest.update(b"".join(part.tobytes() for part in ids))
        for source in self.sources:
            store = source.store
            digest.update(store.summary.vocabulary.encode())
            for part in (source.train, source.eval):
                samples = _expand(store, part)
                for numbers in (store.digests[part], store.lengths[samples], store.supervised[samples]):
                    digest.update(numbers.tobytes())
                digest.update(b"|")
        return digest.hexdigest()

    def report(self) -> dict[str, Any]:
        """data.json: per source what was read, kept and dropped, and why."""
        return {
            "fingerprint": self.fingerprint,
            "duplicates": self.duplicates,
            "sources": [*(self.stream.report() if self.stream else ()), *(source.report() for source in self.sources)],
        }


def build_dataset(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    terminators: Sequence[int],
    seed: int,
    reader: ImageReader | None = None,
) -> Dataset:
    """Read, split and encode all sources.

    Args:
        terminators: token ids that end an answer, the first of which is written where a template has none.
        seed: picks the conversations that are kept for evaluation, and those that mixing leaves out.
        reader: of a model that sees.

    Raises:
        UsageError: bad data, or nothing left to learn.
    """
    rules = ImageRules(limits=ImageLimits(allow_urls=config.fetch_images))
    encoder = Encoder(tokenizer, terminators, config.max_tokens, config.on_long, config.loss_on, reader, rules)
    if config.streaming:
        return _open_stream(config, encoder, seed)
    train = [_encode(name, source, encoder, config) for name, source in _name_sources(config.train)]
    held_out = [_encode(name, source, encoder, config) for name, source in _name_sources(config.eval)]
    for source in held_out:
        # a source that stands in both lists keeps its name apart
        source.name += " (eval)" if any(other.name == source.name for other in train) else ""
    sources = [*train, *held_out]
    _split(train, held_out, config.eval_fraction, seed)
    first = _find_duplicates(train)
    duplicates = _handle_duplicates(train, first, config.duplicates)
    weights = [source.config.weight or 1.0 for source in train]
    mixed = mix([source.train for source in train], weights, config.mixing, seed)
    for source, taken in zip(train, mixed, strict=True):
        _note_mixing(source, taken)
        source.train = taken
    dataset = Dataset(sources, _gather(train, first), _gather_eval(sources), duplicates)
    _check_learnable(dataset)
    _warn_of_near_duplicates(dataset)
    return dataset


def _open_stream(config: DataConfig, encoder: Encoder, seed: int) -> Dataset:
    import numpy as np

    held_out = [_encode(name, source, encoder, config) for name, source in _name_sources(config.eval)]
    for source in held_out:
        source.eval = np.flatnonzero(source.store.count)
    weighted = config.mixing == "first_exhausted"
    questions = {question.tobytes() for source in held_out for question in source.store.questions}
    stream = Stream(config.train, encoder, config.window_samples, weighted, seed, config.workers, questions)
    dataset = Dataset(held_out, stream.read().samples, _gather_eval(held_out), stream=stream)
    _check_learnable(dataset)
    return dataset


def _encode(name: str, source: SourceConfig, encoder: Encoder, config: DataConfig) -> EncodedSource:
    import numpy as np

    store = encode_source(source, encoder, config.cache, config.workers)
    none = np.zeros(0, dtype=np.int64)
    return EncodedSource(name, source, store, none, none, Counter(store.summary.dropped))


def _name_sources(configs: Sequence[SourceConfig]) -> list[tuple[str, SourceConfig]]:
    """A name for each source, the end of its path; equal ones are numbered."""
    taken: set[str] = set()
    named = []
    for config in configs:
        end = config.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
        name = config.dataset or "/".join(filter(None, [end, config.subset]))
        free = next(n for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if n not in taken)
        taken.add(free)
        named.append((free, config))
    return named


def _split(train: list[EncodedSource], held_out: list[EncodedSource], fraction: float, seed: int) -> None:
    """Give each source the conversations to train on and to evaluate on, out of those that have samples."""
    import numpy as np

    usable = [np.flatnonzero(source.store.count) for source in train]
    questions = [source.store.questions[numbers] for source, numbers in zip(train, usable, strict=True)]
    if held_out:
        kept = exclude_questions(questions, [source.store.questions for source in held_out])
        for source, numbers, picked in zip(train, usable, kept, strict=True):
            source.train = numbers[picked]
            if overlap := len(numbers) - len(picked):
                source.dropped[HELD_OUT] += overlap
        for source in held_out:
            source.eval = np.flatnonzero(source.store.count)
        return
    parts = split_questions(questions, fraction, seed)
    for source, numbers, picked, apart in zip(train, usable, *parts, strict=True):
        source.train, source.eval = numbers[picked], numbers[apart]
        if fraction and len(numbers) and not len(apart):
            count = len(numbers)
            source.notes.append(f"none is kept for evaluation: {fraction:g} of {count} is less than one question")


def _find_duplicates(train: list[EncodedSource]) -> Array:
    """(conversations of all sources) the number of the first equal one."""
    import numpy as np

    return find_first(np.concatenate([source.store.digests for source in train]))


def _handle_duplicates(train: list[EncodedSource], first: Array, duplicates: Duplicates) -> int:
    """Drop exact duplicates if that is wanted; note and return how many there are."""
    import numpy as np

    total = start = 0
    for source in train:
        end = start + len(source.store.digests)
        repeated = first[start:end] != np.arange(start, end)
        count = int(repeated[source.train].sum())
        start, total = end, total + count
        if not count:
            continue
        what = f"{count} exact duplicate{'s' if count > 1 else ''}"
        if duplicates == "drop":
            source.train = source.train[~repeated[source.train]]
            source.dropped["exact duplicate"] += count
        elif duplicates == "fold":
            source.notes.append(f"{what}, computed once in a step, with their number as weight")
        else:
            source.notes.append(f"{what}, each computed")
    return total


def _note_mixing(source: EncodedSource, taken: Array) -> None:
    import numpy as np

    different = len(np.unique(taken))
    if left_out := len(source.train) - different:
        source.dropped["left out by data.mixing"] += left_out
    if repeated := len(taken) - different:
        source.notes.append(f"data.mixing takes {repeated} conversations more than once in an epoch")


def _gather(sources: list[EncodedSource], first: Array) -> Samples:
    """The training samples; equal conversations are given the same samples, whatever their source."""
    import numpy as np

    stores = [source.store for source in sources]
    borders = np.cumsum([0, *(len(store.digests) for store in stores)])
    chosen = np.concatenate([first[source.train + start] for source, start in zip(sources, borders, strict=False)])
    owners = np.searchsorted(borders, chosen, side="right") - 1
    starts = np.concatenate([store.first for store in stores])[chosen]
    counts = np.concatenate([store.count for store in stores])[chosen]
    return Samples(stores, np.repeat(owners, counts), count_up(starts, counts))


def _gather_eval(sources: list[EncodedSource]) -> dict[str, Samples]:
    import numpy as np

    found = {}
    for source in sources:
        if len(indices := _expand(source.store, source.eval)):
            found[source.name] = Samples([source.store], np.zeros(len(indices), dtype=np.int64), indices)
    return found


def _expand(store: Store, conversations: Array) -> Array:
    """The numbers of the conversations' samples, in their order."""
    return count_up(store.first[conversations], store.count[conversations])


def _check_learnable(dataset: Dataset) -> None:
    if dataset.train.supervised.sum():
        return
    reasons = Counter[str]()
    for source in dataset.stream.report() if dataset.stream else ():
        reasons.update(source["dropped"])
    for encoded in dataset.sources:
        reasons.update(encoded.dropped)
    why = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
    why = why or "all of its conversations are kept for evaluation"
    raise UsageError(f"No token is left to learn from data.train ({why}).")


def _warn_of_near_duplicates(dataset: Dataset) -> None:
    """A note on each source whose evaluation is nearly trained on."""
    import numpy as np

    if not dataset.eval:
        return
    train = (np.concatenate(ids) for ids in dataset.train.each_ids())
    evaluation = [[ids for group in samples.each_ids() for ids in group] for samples in dataset.eval.values()]
    sources = {source.name: source for source in dataset.sources}
    for name, count in zip(dataset.eval, find_near_duplicates(train, evaluation), strict=True):
        if count:
            sources[name].notes.append(
                f"{count} of {len(dataset.eval[name])} evaluation samples are nearly the same as training samples, so "
                "their loss says little about unseen data"
            )
