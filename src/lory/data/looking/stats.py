"""Statistics of a data set as it will be learnt from: lengths, shares, duplicates, languages, and the odd records.

All is taken from the encoded stores: numbers, one a sample, and texts that are decoded a few at a time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lory.data.encoding.samples import Samples, count_up
from lory.data.encoding.store import Store
from lory.data.looking.excerpts import Excerpts
from lory.data.looking.histogram import Histogram, count_lengths
from lory.data.mixture.dataset import Dataset, EncodedSource, describe_lengths
from lory.data.mixture.duplicates import find_first
from lory.data.mixture.stream import Stream

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Record:
    """A conversation that stands out."""

    where: str
    """File and line it was read from."""
    tokens: int
    """Of all its samples."""
    learnt: int
    text: str
    """Its first words, after the tokens that all of the source's samples begin with."""


@dataclass(frozen=True)
class SourceStats:
    """A source in numbers; what is counted in tokens or conversations is what is trained or evaluated on."""

    name: str
    path: str
    read: int | None
    """Records that are there; None of a stream, which was not read to its end."""
    conversations: dict[str, int]
    """Different ones that are trained and evaluated on (`train`, `eval`)."""
    samples: dict[str, int]
    tokens: int
    supervised_tokens: int
    supervised_share: float
    dropped: dict[str, int]
    exact_duplicates: int
    """Conversations that equal one before them, in this source or in one above."""
    notes: list[str]
    lengths: dict[str, Any] | None
    histogram: Histogram
    """Of the samples' tokens."""
    languages: dict[str, float]
    """Share of the conversations by ISO 639-1 code, the commonest first; `other` where it is unsure."""
    longest: list[Record]
    shortest: list[Record]
    emptiest: list[Record]
    """Those with the fewest learnt tokens."""

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def describe_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int, most: int = 3
) -> list[SourceStats]:
    """The statistics of each source; of a stream, those of its first window as one source.

    Args:
        max_tokens: the longest sample there can be, where the histograms end.
        most: how many of the longest, shortest and emptiest conversations are named.
    """
    repeated = _find_repeated(dataset.sources)
    parts = [_take(source, repeat) for source, repeat in zip(dataset.sources, repeated, strict=True)]
    if dataset.stream is not None:
        parts.insert(0, _take_window(dataset.train, dataset.stream))
    return [_measure(part, tokenizer, max_tokens, most) for part in parts]


def add_up(sources: Sequence[SourceStats], most: int = 3) -> dict[str, Any]:
    """All sources together, in the form of `SourceStats.to_dict` without what only one source has."""
    conversations, samples, dropped = (
        sum((Counter(getattr(source, field)) for source in sources), Counter())
        for field in ("conversations", "samples", "dropped")
    )
    languages: Counter[str] = Counter()
    for source in sources:
        count = sum(source.conversations.values())
        languages.update({code: round(share * count) for code, share in source.languages.items()})
    tokens, supervised = (sum(getattr(s, field) for s in sources) for field in ("tokens", "supervised_tokens"))

    def pick(field: str, key: str, longest: bool = False) -> list[dict[str, Any]]:
        records = itertools.chain.from_iterable(getattr(source, field) for source in sources)
        return [asdict(record) for record in sorted(records, key=lambda r: getattr(r, key), reverse=longest)[:most]]

    return {
        "read": None if any(source.read is None for source in sources) else sum(s.read or 0 for s in sources),
        "conversations": {"train": conversations["train"], "eval": conversations["eval"]},
        "samples": {"train": samples["train"], "eval": samples["eval"]},
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": _share(supervised, tokens),
        "dropped": dict(dropped),
        "exact_duplicates": sum(source.exact_duplicates for source in sources),
        "histogram": asdict(Histogram.add([source.histogram for source in sources])),
        "languages": _to_shares(languages),
        "longest": pick("longest", "tokens", longest=True),
        "shortest": pick("shortest", "tokens"),
        "emptiest": pick("emptiest", "learnt"),
    }


def _find_repeated(sources: Sequence[EncodedSource]) -> list[Array]:
    """For each source, (conversations) whether an equal one stands before it."""
    import numpy as np

    borders = np.cumsum([0, *(len(source.store.digests) for source in sources)])
    if not len(sources):
        return []
    first = find_first(np.concatenate([source.store.digests for source in sources]))
    return np.split(first != np.arange(len(first)), borders[1:-1])


@dataclass(frozen=True)
class _Part:
    """What is known of a source before its samples are looked at."""

    store: Store
    train: Array
    eval: Array
    name: str
    path: str
    read: int | None
    dropped: dict[str, int]
    exact_duplicates: int
    notes: list[str]


def _take(source: EncodedSource, repeated: Array) -> _Part:
    import numpy as np

    report = source.report()
    # data.mixing may take a conversation more than once
    train, apart = np.unique(source.train), np.unique(source.eval)
    duplicates = int(repeated[train].sum()) + source.dropped["exact duplicate"]
    path, read, dropped, notes = (report[key] for key in ("path", "read", "dropped", "notes"))
    return _Part(source.store, train, apart, source.name, path, read, dropped, duplicates, notes)


def _take_window(samples: Samples, stream: Stream) -> _Part:
    import numpy as np

    store, reports = samples.stores[0], stream.report()
    there = np.flatnonzero(store.count)
    dropped = sum((Counter(report["dropped"]) for report in reports), Counter())
    repeated = find_first(store.digests) != np.arange(len(store.digests))
    notes = [f"{report['name']}: {note}" for report in reports for note in report["notes"]]
    path = ", ".join(report["path"] for report in reports)
    duplicates = int(repeated[there].sum())
    return _Part(store, there, there[:0], "the stream's first window", path, None, dict(dropped), duplicates, notes)


def _measure(part: _Part, tokenizer: PreTrainedTokenizerBase, max_tokens: int, most: int) -> SourceStats:
    import numpy as np

    store, used = part.store, np.union1d(part.train, part.eval)
    samples = count_up(store.first[used], store.count[used])
    lengths = np.sort(store.lengths[samples])
    tokens, supervised = int(lengths.sum()), int(store.supervised[samples].sum())
    sizes, learnt = (_sum_by_conversation(numbers, store)[used] for numbers in (store.lengths, store.supervised))
    texts = Excerpts(store, samples, tokenizer)

    def pick(order: Array) -> list[Record]:
        chosen = np.argsort(order, kind="stable")[:most].tolist()
        return [
            Record(store.place(int(used[at])), int(sizes[at]), int(learnt[at]), texts.begin(int(store.first[used[at]])))
            for at in chosen
        ]

    return SourceStats(
        name=part.name,
        path=part.path,
        read=part.read,
        conversations={"train": len(part.train), "eval": len(part.eval)},
        samples={"train": int(store.count[part.train].sum()), "eval": int(store.count[part.eval].sum())},
        tokens=tokens,
        supervised_tokens=supervised,
        supervised_share=_share(supervised, tokens),
        dropped=part.dropped,
        exact_duplicates=part.exact_duplicates,
        notes=part.notes,
        lengths=describe_lengths(lengths),
        histogram=count_lengths(lengths, max_tokens),
        languages=_to_shares(texts.count_languages(store.first[used] + store.count[used] - 1)),
        longest=pick(-sizes),
        shortest=pick(sizes),
        emptiest=pick(learnt),
    )


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _to_shares(counts: Counter[str]) -> dict[str, float]:
    return {code: _share(count, counts.total()) for code, count in counts.most_common()}


def _sum_by_conversation(numbers: Array, store: Store) -> Array:
    """(conversations) the sum of their samples' numbers."""
    import numpy as np

    sums = np.concatenate([[0], np.cumsum(numbers)])
    found: Array = sums[store.first + store.count] - sums[store.first]
    return found
