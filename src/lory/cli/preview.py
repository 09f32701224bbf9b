"""A look at what a config would learn, for `lory train --dry-run` and `lory data show`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lory.cli.options import print_json

if TYPE_CHECKING:
    from rich.console import Console

    from lory.training.run import Prepared


def preview(prepared: Prepared, samples: int, as_json: bool, with_config: bool, short: bool = False) -> None:
    """Print samples, counts and memory; with the config, as the dry run has it, or else with each source explained.

    Args:
        samples: how many in all; where sources are explained, of each.
        short: whether long messages are cut.
    """
    from rich.console import Console

    from lory.config import dump_yaml
    from lory.training.preview import estimate_memory, pick_samples
    from lory.training.run import describe_sources

    plan = prepared.plan()
    report = prepared.report(plan)
    memory = estimate_memory(prepared, plan.rows)
    if as_json:
        config = {"config": prepared.config.model_dump(mode="json")} if with_config else {}
        found = _describe(prepared, samples, with_config, short)
        print_json({**config, **found, "data": report, "memory_bytes": memory})
        return
    # what is shown is the user's own text, in which [b] and :cat: are no markup
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if with_config:
        console.print(dump_yaml(prepared.config))
        for index in pick_samples(prepared.dataset, samples, each_source=False):
            _print_sample(prepared, index, console)
    else:
        _print_sources(prepared, samples, short, console)
    for line in describe_sources(report):
        console.print(line)
    console.print(f"{report['rows']:,} rows, {report['steps']:,} optimizer steps")
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in memory.items() if name != "total")
    console.print(f"memory, roughly: {memory['total'] / 1e9:.2f} GB ({parts})")


def _describe(prepared: Prepared, count: int, with_config: bool, short: bool) -> dict[str, Any]:
    """The samples as JSON; unless it is a dry run with their messages, and with the sources explained."""
    from lory.data.sources.read import explain_source
    from lory.training.preview import describe_messages, describe_sample, find_conversations, pick_samples

    dataset, tokenizer = prepared.dataset, prepared.tokenizer
    indices = pick_samples(dataset, count, each_source=not with_config)
    samples = [describe_sample(dataset.train[index], tokenizer) for index in indices]
    if with_config:
        return {"samples": samples}
    for sample, conversation in zip(samples, find_conversations(dataset, prepared.config.data, indices), strict=True):
        sample |= {"where": conversation.where, **describe_messages(conversation, short)}
    sources = [explain_source(source).to_dict() for source in prepared.config.data.train]
    return {"sources": sources, "samples": samples}


def _print_sources(prepared: Prepared, count: int, short: bool, console: Console) -> None:
    from lory.data.sources.read import explain_source
    from lory.training.preview import find_conversations, pick_samples, show_messages, show_tokens

    for source in prepared.config.data.train:
        for line in _explain(explain_source(source).to_dict()):
            console.print(line)
    indices = pick_samples(prepared.dataset, count, each_source=True)
    conversations = find_conversations(prepared.dataset, prepared.config.data, indices)
    for index, conversation in zip(indices, conversations, strict=True):
        console.print(f"\n{conversation.where}", style="bold")
        console.print(show_messages(conversation, short), end="\n\n")
        _print_sample(prepared, index, console)
        console.print(show_tokens(prepared.dataset.train[index], prepared.tokenizer), end="\n\n")


def _explain(explanation: dict[str, Any]) -> Iterator[str]:
    keys = ", ".join(f"{key} ({' or '.join(types)})" for key, types in explanation["keys"].items())
    yield f"{explanation['name']}: read as {explanation['format'] or 'no known format'}; keys: {keys}"
    if explanation["unused"]:
        yield f"  not used: {', '.join(explanation['unused'])}"
    for name, missing in explanation["close"].items():
        yield f"  {name} comes close, but lacks {', '.join(missing)}"


def _print_sample(prepared: Prepared, index: int, console: Console) -> None:
    from lory.training.preview import show_sample

    sample = prepared.dataset.train[index]
    console.print(show_sample(sample, prepared.tokenizer), end="\n\n")
    console.print(f"{len(sample)} tokens, {sample.supervised} learnt (in ⟦ ⟧)\n", style="cyan")
