"""Writes what `benchmarks.step`, `.memory` and `.curves` measured into docs/benchmarks.md, and draws the bars.

    python -m benchmarks.report RESULTS [--page docs/benchmarks.md] [--picture docs/images/training-step.png]

RESULTS is a folder of JSON files, as `make bench` leaves it: step-*.json, memory.json and curves.json; what is not
there is left out. What stands in the page between ``<!-- step:begin -->`` and ``<!-- step:end -->`` is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# what `make bench` has benchmarks.curves draw, beside the bars
CURVES = "loss-curves.png"
BEGIN, END = "<!-- step:begin -->", "<!-- step:end -->"
COLOURS = {"hf": "#c44e52", "trl": "#dd8452", "lory": "#1f4e79", "lory-default": "#6f94b8"}
NAMES = {
    "hf": "Trainer + PEFT",
    "trl": "TRL, packed",
    "lory": "lory",
    "lory-default": "lory, torch's products",
}
Result = dict[str, Any]


def read_results(folder: Path) -> dict[str, Result]:
    """The JSON files of a folder by their names; empty ones, of runs that failed, are left out."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json"))}
    return {name: json.loads(text) for name, text in texts.items() if text.strip()}


def list_runs(results: dict[str, Result]) -> Iterator[tuple[str, Result]]:
    """Each measured setting of the step with its description."""
    for name, result in results.items():
        if not name.startswith("step"):
            continue
        targets = "q, v" if result["targets"] == "qv" else "all linear"
        for run in result["runs"]:
            label = f"{targets}, {result['records']}, {run['threads']} thread{'s'[: run['threads'] > 1]}"
            yield label + ("" if result["onednn"] else ", no oneDNN"), run


def find_processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_machine(results: dict[str, Result]) -> list[str]:
    """One line: machine and versions."""
    versions = next((result["versions"] for result in results.values() if "versions" in result), {})
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [f"{find_processor()}, {os.cpu_count()} cores; {told}.", ""]


def write_steps(results: dict[str, Result]) -> list[str]:
    """The table of speeds."""
    lines = [
        "| setting | tool | s a step | tokens/s | learnt/s | peak MB | lory's speed | by CPU time | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    runs = list(list_runs(results))
    for label, run in runs:
        for peer, values in run["peers"].items():
            cells = [label, NAMES[peer], f"{values['seconds']:.2f}", f"{values['tokens_per_second']:.0f}"]
            cells += [f"{values['supervised_per_second']:.0f}", f"{values['peak_bytes'] / 1e6:.0f}"]
            cells += _ratio_cells(run, peer)
            lines.append("| " + " | ".join(cells) + " |")
            label = ""
    if not runs:
        return []
    worst = max(run["first_loss_difference"] for _, run in runs)
    rounds = sorted({run["rounds"] for _, run in runs})
    told = " or ".join(str(number) for number in rounds)
    return [*lines, "", f"{told} rounds; the loss of the first step differs by at most {worst:.1e}.", ""]


def _ratio_cells(run: Result, peer: str) -> list[str]:
    if peer not in run["speed_ratio"]:
        return ["", "", ""]
    speed = run["speed_ratio"][peer]
    spread = f"{speed['median']:.2f} ({speed['min']:.2f}-{speed['max']:.2f})"
    return [spread, f"{run['cpu_ratio'][peer]['median']:.2f}", f"{run['memory_ratio'][peer]:.2f}"]


def write_memory(result: Result) -> list[str]:
    """Peaks over tokens, their slopes, and the long context."""
    slopes = result["slopes"]
    tokens = slopes["lory"]["tokens"]
    lines = [
        f"Peak memory of a step over its tokens, in rows of {result['row']} (MB), and what a token more costs:",
        "",
        "| tool | " + " | ".join(str(n) for n in tokens) + " | KB a token |",
        "| --- |" + " --- |" * (len(tokens) + 1),
    ]
    for peer, line in slopes.items():
        peaks = " | ".join(f"{peak / 1e6:.0f}" for peak in line["peak_bytes"])
        lines.append(f"| {NAMES[peer]} | {peaks} | {line['bytes_a_token'] / 1e3:.0f} |")
    off = slopes["lory"]["off_the_line"]
    lines += [
        "",
        f"lory's slope is {result['slope_ratio']:.2f} of the Trainer's; its line is off by {off:.1%} at most.",
    ]
    if context := result["context"]:
        parts = []
        for peer, step in context["steps"].items():
            needed = slopes[peer]["bytes_at_zero"] + slopes[peer]["bytes_a_token"] * context["tokens"]
            told = f"takes {step['seconds']:.0f} s and {step['peak_bytes'] / 1e9:.1f} GB" if step else "fails"
            parts.append(f"{NAMES[peer]} {told} (its line says {needed / 1e9:.1f} GB)")
        limit = context["limit_bytes"] / 1e9
        lines.append(f"One row of {context['tokens']:,} tokens within {limit:.0f} GB: {', '.join(parts)}.")
    return [*lines, ""]


def write_curves(result: Result) -> list[str]:
    """What the curves say."""
    losses = result["losses"]["lory"]
    return [
        f"{len(losses)} steps on the same batches take the loss from {losses[0]:.3f} to {losses[-1]:.3f}; lory's and",
        f"the Trainer's differ by {result['first_difference']:.1e} at the first step and by at most "
        f"{result['largest_difference']:.1e} at any.",
        "",
    ]


def draw_bars(results: dict[str, Result], path: Path) -> None:
    """Tokens a second and peak memory of each setting, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = list(list_runs(results))
    peers = [peer for peer in NAMES if any(peer in run["peers"] for _, run in runs)]
    figure, axes = pyplot.subplots(
        1, 2, figsize=(9, 1.2 + 0.75 * len(runs)), dpi=100, sharey=True, layout="constrained"
    )
    height = 0.8 / len(peers)
    for side, key, scale, title in (
        (axes[0], "tokens_per_second", 1.0, "real tokens a second (more is better)"),
        (axes[1], "peak_bytes", 1e9, "peak memory in GB (less is better)"),
    ):
        for row, (_, run) in enumerate(runs):
            present = [peer for peer in peers if peer in run["peers"]]
            for place, peer in enumerate(present):
                value = run["peers"][peer][key] / scale
                y = row + (place - (len(present) - 1) / 2) * height
                side.barh(y, value, height * 0.92, color=COLOURS[peer])
                side.text(value, y, f" {value:.0f}" if scale == 1.0 else f" {value:.1f}", va="center", fontsize=8)
        side.set_title(title, fontsize=10)
        side.margins(x=0.12)
        side.spines[["top", "right", "left"]].set_visible(False)
        side.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(runs)), [label for label, _ in runs])
    axes[0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[peer]) for peer in peers]
    figure.legend(handles, [NAMES[peer] for peer in peers], loc="outside lower center", ncols=len(peers), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def show(title: str, picture: Path, page: Path) -> list[str]:
    """A picture in the page."""
    return [f"![{title}]({Path(os.path.relpath(picture, page.parent)).as_posix()})", ""]


def fill_page(page: Path, lines: list[str]) -> None:
    """Put the lines between the page's marks."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no marks {BEGIN} and {END}; put them where the results belong.")
    page.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


def main() -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/training-step.png"))
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    lines = write_machine(results) + write_steps(results)
    if "memory" in results:
        lines += write_memory(results["memory"])
    if any(True for _ in list_runs(results)):
        draw_bars(results, arguments.picture)
        lines += show("Tokens a second and peak memory of each tool", arguments.picture, arguments.page)
    if "curves" in results:
        lines += write_curves(results["curves"])
        drawn = arguments.picture.with_name(CURVES)
        lines += show("The losses of both, one on the other", drawn, arguments.page) if drawn.exists() else []
    fill_page(arguments.page, lines)


if __name__ == "__main__":
    main()
