"""What `lory data stats` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lory.training.run import Prepared


def gather_stats(prepared: Prepared, picture: Path) -> dict[str, Any]:
    """The statistics as JSON; draws the picture."""
    from lory.data.looking.histogram import draw_picture
    from lory.data.looking.stats import add_up, describe_dataset
    from lory.data.mixture.packing import efficiency
    from lory.training.plan import count_steps

    config, dataset, plan = prepared.config, prepared.dataset, prepared.plan()
    data = config.data
    sources = describe_dataset(dataset, prepared.tokenizer, data.max_tokens)
    draw_picture({source.name: source.histogram for source in sources}, data.max_tokens, picture)
    tokens = int(dataset.train.lengths.sum())
    return {
        "streamed": data.streaming,
        "sources": [source.to_dict() for source in sources],
        "all": add_up(sources),
        "max_tokens": data.max_tokens,
        "rows": len(plan.rows),
        "packing_efficiency": efficiency(tokens, len(plan.rows), data.max_tokens) if data.packing else None,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": count_steps(config.train, plan, data.streaming),
        "picture": str(picture),
    }


def print_stats(stats: Mapping[str, Any]) -> None:
    """The same for a person."""
    if stats["streamed"]:
        print("The data are streamed; these are the statistics of the first window.\n")
    for source in stats["sources"]:
        print("\n".join(_describe_source(source)), end="\n\n")
    if len(stats["sources"]) > 1:
        everything = {"name": "all sources", "notes": [], "lengths": None, **stats["all"]}
        print("\n".join(_describe_source(everything)), end="\n\n")
    packed = stats["packing_efficiency"]
    full = f", {packed:.1%} full" if packed is not None else ""
    steps = f"{stats['steps_per_epoch']:,} optimizer steps an epoch, {stats['steps']:,} in all"
    print(f"{stats['rows']:,} rows{full}; {steps}\npicture: {stats['picture']}")


def _describe_source(source: Mapping[str, Any]) -> Iterator[str]:
    from lory.data.looking.histogram import Histogram, draw_blocks

    conversations, samples = source["conversations"], source["samples"]
    read = "" if source["read"] is None else f"{source['read']:,} records: "
    learnt = f"{source['tokens']:,} tokens, {source['supervised_share']:.1%} of them learnt"
    yield source["name"]
    yield f"  {read}{conversations['train']:,} conversations to train on, {conversations['eval']:,} to evaluate on"
    yield f"  {sum(samples.values()):,} samples, {learnt}"
    yield from (f"  dropped {count:,}: {reason}" for reason, count in source["dropped"].items())
    yield f"  exact duplicates: {source['exact_duplicates']:,}"
    yield from (f"  note: {note}" for note in source["notes"])
    yield "  languages: " + ", ".join(f"{code} {share:.1%}" for code, share in source["languages"].items())
    if lengths := source["lengths"]:
        yield "  tokens a sample: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items())
    yield from (f"    {line}" for line in draw_blocks(Histogram(**source["histogram"])))
    for title in ("longest", "shortest", "emptiest"):
        for record in source[title]:
            counts = f"{record['tokens']:,} tokens, {record['learnt']:,} learnt"
            yield f"  {title}: {record['where']} ({counts}): {record['text']}"
