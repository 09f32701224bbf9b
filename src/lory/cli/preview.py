"""A look at what a config would learn, for `lory train --dry-run` and `lory data show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lory.cli.options import print_json

if TYPE_CHECKING:
    from lory.training.run import Prepared


def preview(prepared: Prepared, samples: int, as_json: bool, with_config: bool) -> None:
    from rich.console import Console

    from lory.config import dump_yaml
    from lory.training.preview import describe_sample, estimate_memory, show_sample
    from lory.training.run import describe_sources

    plan = prepared.plan()
    report = prepared.report(plan)
    shown = prepared.dataset.train[:samples]
    memory = estimate_memory(prepared, plan.rows)
    if as_json:
        config = {"config": prepared.config.model_dump(mode="json")} if with_config else {}
        described = [describe_sample(sample, prepared.tokenizer) for sample in shown]
        print_json({**config, "samples": described, "data": report, "memory_bytes": memory})
        return
    # what is shown is the user's own text, in which [b] and :cat: are no markup
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if with_config:
        console.print(dump_yaml(prepared.config))
    for sample in shown:
        console.print(show_sample(sample, prepared.tokenizer), end="\n\n")
        console.print(f"{len(sample)} tokens, {sample.supervised} learnt (in ⟦ ⟧)\n", style="cyan")
    for line in describe_sources(report):
        console.print(line)
    console.print(f"{report['rows']:,} rows, {report['steps']:,} optimizer steps")
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in memory.items() if name != "total")
    console.print(f"memory, roughly: {memory['total'] / 1e9:.2f} GB ({parts})")
