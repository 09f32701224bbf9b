"""`lory eval`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lory.cli.options import BaseDtype, Device, Json, Model, Quantize, TrustRemoteCode, print_json
from lory.runtime import UsageError, log, write_json

if TYPE_CHECKING:
    from lory.data.sources.read import SourceConfig
    from lory.evaluate.run import Evaluation, Settings
    from lory.generate import GenerationOptions


class LossOn(str, Enum):
    """Which tokens are supervised."""

    assistant = "assistant"
    last = "last"
    all = "all"


def eval(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder, hub data set or `identity`; FILE#200 draws 200; or '{path: FILE, ...}'."),
    ] = None,
    most: Annotated[
        int | None, typer.Option("-n", min=1, help="So many records (of plain texts: windows) of each source.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The assistant's name, for identity and {{name}}.")] = None,
    author: Annotated[str | None, typer.Option(help="Who made it, for identity and {{author}}.")] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest record, in tokens; longer ones are left out.")] = 2048,
    loss_on: Annotated[LossOn, typer.Option(help="Which tokens the loss is over.")] = LossOn.assistant,
    generate: Annotated[bool, typer.Option("--generate", help="Let the model answer the prompts, too.")] = False,
    answers: Annotated[int, typer.Option(min=1, help="Answers to each prompt; several are sampled.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; else greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Sample from tokens at least so likely.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: seen tokens are less likely.")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="No n-gram of this size comes twice.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    greedy_continuation: Annotated[
        str | None, typer.Option(help="Continue plain texts, as in 50:100 tokens.", metavar="PREFIX:COMPLETION")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 8,
    fetch_images: Annotated[
        bool, typer.Option("--fetch-images", help="Fetch images whose addresses on the web are in the data.")
    ] = False,
    tasks: Annotated[list[str] | None, typer.Option(help="A task of lm-eval's.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    review: Annotated[
        Path | None, typer.Option(help="Review queue, FILE.jsonl, to put parroted and empty answers into.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for scores and predictions.")] = None,
    dtype: BaseDtype = None,
    device: Device = None,
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and accuracy on data, and how the model's own answers compare with the targets."""
    decoding = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "seed": seed,
    }
    given = {key: value for key, value in decoding.items() if value is not None}
    _check_usage(bool(data), bool(tasks), generate, {**given, "answers": answers > 1, "review": review}, out)
    from lory.assistant import load
    from lory.evaluate.run import Settings, evaluate
    from lory.evaluate.tasks import run_tasks
    from lory.models.matmul import choose_fp32_matmul

    settings = Settings(
        max_tokens=max_tokens,
        most_records=most,
        loss_on=loss_on.value,
        generate=generate,
        answers=answers,
        options=_read_options(given, max_new_tokens, answers),
        continuation=_read_lengths(greedy_continuation) if greedy_continuation else None,
        batch_size=batch_size,
        fetch_images=fetch_images,
    )
    sources = [_read_source(text, name, author) for text in data or ()]
    bits: Any = quantize.value if quantize else None
    assistant = load(model, dtype.value if dtype else "auto", device, trust_remote_code, bits)
    log.debug("%s", choose_fp32_matmul(assistant.model.device))
    result: dict[str, Any] = {"model": model}
    if sources:
        with _bars() as progress:
            evaluation = evaluate(assistant, sources, settings, progress)
        result = {**evaluation.to_dict(), "settings": _describe(settings)}
        if out is not None:
            evaluation.write(out, result)
        if review is not None:
            result["queued"] = _enqueue(evaluation, review)
    interrupted = result.get("interrupted", False)
    if tasks and not interrupted:
        result["tasks"] = run_tasks(assistant, tasks, most, batch_size, include_path)
        if out is not None:
            write_json(out / "scores.json", result)
    if as_json:
        print_json(result)
    else:
        _print(result, out, review)
    if interrupted:
        log.warning("Stopped by Ctrl-C: the scores are those of what was done until then.")
        raise typer.Exit(1)


def _check_usage(data: bool, tasks: bool, generate: bool, needs_answers: Mapping[str, Any], out: Path | None) -> None:
    if not data and not tasks:
        raise UsageError("Neither --data nor --tasks was given; name what to evaluate on, as in --data file.jsonl.")
    for option, value in needs_answers.items():
        if value is not None and value is not False and not generate:
            flag = option.replace("_", "-")
            raise UsageError(
                f"--{flag} was given without --generate, so there are no answers it could be about; add it."
            )
    if generate and not data:
        raise UsageError("--generate was given without --data; name a source of prompts.")
    if out is not None and not data:
        raise UsageError("--out was given without --data, whose predictions it is for; leave it out.")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another folder, or delete it first.")


def _read_options(given: Mapping[str, Any], max_new_tokens: int, answers: int) -> GenerationOptions:
    from lory.config import build
    from lory.generate import GenerationOptions

    samples = answers > 1 or bool(given.keys() & {"temperature", "top_k", "top_p", "min_p"})
    values = {"max_new_tokens": max_new_tokens, "do_sample": samples, **given}
    return build(GenerationOptions, values, "decoding")


def _read_lengths(text: str) -> tuple[int, int]:
    before, _, after = text.partition(":")
    if not (before.isdecimal() and after.isdecimal() and int(before) and int(after)):
        raise UsageError(
            f"--greedy-continuation '{text}' was given; PREFIX:COMPLETION in tokens is expected, as 50:100."
        )
    return int(before), int(after)


def _read_source(text: str, name: str | None, author: str | None) -> SourceConfig:
    from lory.config import build, parse_yaml
    from lory.data.sources.config import SourceConfig, read_short_form

    where = f"--data {text}"
    # the long form, as in a config
    values = parse_yaml(text, where) if text.startswith("{") else read_short_form(text)
    who = {key: value for key, value in (("name", name), ("author", author)) if value is not None}
    return build(SourceConfig, {**values, **who}, where)


def _describe(settings: Settings) -> dict[str, Any]:
    values = {**vars(settings), "options": settings.options.model_dump()}
    return values if settings.generate or settings.continuation else {"max_tokens": settings.max_tokens}


def _enqueue(evaluation: Evaluation, path: Path) -> int:
    """Put the answers that are parroted or empty into a review queue; returns how many."""
    from lory.chat.review import ReviewItem, enqueue

    count = with_images = 0
    for prediction in evaluation.predictions:
        reasons = [f"parroting: {kind}" for kind in prediction.parroting]
        if prediction.kind == "answer" and not (prediction.answer or "").strip():
            reasons.append("empty")
        if prediction.kind != "answer" or not reasons or isinstance(prediction.prompt, str):
            continue
        if prediction.images:
            with_images += 1
            continue
        reason = ", ".join(reasons)
        scores = dict(prediction.scores)
        enqueue(path, ReviewItem(prediction.prompt, prediction.answer or "", reason, scores, evaluation.model))
        count += 1
    if with_images:
        log.warning("%d answers to images were not put into the review queue, which is for texts.", with_images)
    return count


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error for each title."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def show(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = progress.add_task(title, total=total)
            progress.update(tasks[title], completed=done, total=total)

        yield show


def _print(result: Mapping[str, Any], out: Path | None, review: Path | None) -> None:
    sources: dict[str, Any] = result.get("sources", {})
    if sources:
        columns = {name: _flatten(scores) for name, scores in sources.items()}
        if len(sources) > 1:
            columns["all"] = _flatten(result["all"])
        _print_table(columns)
    for task, scores in result.get("tasks", {}).items():
        print(task)
        print("".join(f"  {key:<24} {_number(value)}\n" for key, value in scores.items() if key != "alias"), end="")
    for name, scores in sources.items():
        print("".join(f"{name}: dropped {count:,}: {reason}\n" for reason, count in scores["dropped"].items()), end="")
        print("".join(f"{name}: {note}\n" for note in scores["notes"]), end="")
    for note in result.get("notes", ()):
        print(f"note: {note}")
    if review is not None:
        print(f"{result['queued']:,} answers were put into the review queue: lory review {review}")
    if out is not None:
        print(f"{out}: scores.json, predictions.jsonl, predictions.html")


def _flatten(scores: Mapping[str, Any], above: str = "") -> dict[str, float | None]:
    """The numbers in nested scores under their dotted names, without the single windows of rep/l."""
    flat: dict[str, float | None] = {}
    for key, value in scores.items():
        if isinstance(value, dict) and key != "dropped":
            flat |= _flatten(value, f"{above}{key}.")
        elif (value is None or isinstance(value, int | float)) and "/" not in key:
            flat[f"{above}{key}"] = value
    return flat


def _print_table(columns: Mapping[str, Mapping[str, float | None]]) -> None:
    """A row for each score and a column for each source."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    widest = max(map(len, names))
    widths = {title: max(10, len(title)) for title in columns}
    print(" " * widest, *(f"{title:>{width}}" for title, width in widths.items()), sep="  ")
    for name in names:
        cells = (f"{_number(columns[title].get(name, '')):>{width}}" for title, width in widths.items())
        print(f"{name:<{widest}}", *cells, sep="  ")


def _number(value: Any) -> str:
    if value is None:
        return "inf"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
