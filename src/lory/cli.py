"""The command line: thin commands, each of which imports what it needs when it is called."""

from __future__ import annotations

import json
import logging
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lory.runtime import LoryError, UsageError, log

if TYPE_CHECKING:
    from lory.training.run import Prepared

app = typer.Typer(
    name="lory",
    help="Turns an open language model into your own assistant.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
configs_app = typer.Typer(no_args_is_help=True, help="The bundled configs, and the schema of all configs.")
data_app = typer.Typer(no_args_is_help=True, help="A look at the data.")
app.add_typer(configs_app, name="configs")
app.add_typer(data_app, name="data")

Model = Annotated[
    str,
    typer.Argument(help="A run, a checkpoint, an adapter or model folder, a hub id, or smollm2.", metavar="MODEL"),
]
ConfigSource = Annotated[
    str, typer.Argument(help="A YAML file, the name of a bundled config, or a run's folder.", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Fields to set, as in train.epochs=5.", metavar="[SECTION.FIELD=VALUE]...")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


class Bits(str, Enum):
    """Ways to hold a base in few bits."""

    nf4 = "nf4"
    int8 = "int8"


class SumMode(str, Enum):
    """How adapters are added up."""

    cat = "cat"
    linear = "linear"


class Dtype(str, Enum):
    """Precisions a model can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def train(
    config: ConfigSource,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with a run: last, best or checkpoint-N.", metavar="last|best|checkpoint-N"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as CONFIG says, or go on with a run."""
    from lory.training import run

    if dry_run and resume:
        raise UsageError("Both --dry-run and --resume were given; use one of them.")
    if dry_run:
        from lory.training.config import read_config

        resolved, _ = read_config(config, overrides or ())
        _preview(run.prepare(resolved), samples=1, as_json=as_json, with_config=True)
        return
    result = run.train(config, overrides or (), resume)
    if as_json:
        _print_json(result.to_dict())
    else:
        print(f"Done: {result.folder}\nTalk to it: lory chat {result.folder}")


@data_app.command("show")
def show_data(
    config: ConfigSource,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many samples to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Print samples as the model will see them, the learnt tokens in colour, and the counts."""
    from lory.training.config import read_config
    from lory.training.run import prepare

    resolved, _ = read_config(config, overrides or ())
    _preview(prepare(resolved), samples=count, as_json=as_json, with_config=False)


def _preview(prepared: Prepared, samples: int, as_json: bool, with_config: bool) -> None:
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
        _print_json({**config, "samples": described, "data": report, "memory_bytes": memory})
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


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the base weights.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs, as in cpu or cuda:0.")] = None,
    quantize: Annotated[Bits | None, typer.Option(help="Hold the base in few bits.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Talk to a model in the terminal; :help lists the commands there."""
    from lory.assistant import load
    from lory.chat.terminal import run_chat

    bits: Any = quantize.value if quantize else None
    assistant = load(model, dtype.value if dtype else "auto", device, trust_remote_code, bits)
    raise typer.Exit(run_chat(assistant, system))


@app.command()
def merge(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", metavar="OUT")],
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the merged weights; by default the base's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, as in 5GB or 500MB.")] = "5GB",
    device: Annotated[str, typer.Option(help="Where the products are computed.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model, and check that the result answers alike."""
    import torch

    from lory import export
    from lory.adapters.merge import parse_size

    shard_bytes = parse_size(max_shard_size)
    with _progress("Merging") as progress:
        merged = export.merge(model, out, getattr(torch, dtype.value) if dtype else None, shard_bytes, device, progress)
    if as_json:
        _print_json(merged.to_dict())
    else:
        report = merged.report
        print(
            f"{out}: {report.merged} of {report.tensors} tensors merged, {report.bytes / 1e9:.2f} GB in "
            f"{report.shards} file{'s' if report.shards > 1 else ''}; logits differ from base and adapter by at most "
            f"{merged.difference:.1e} of the largest."
        )


def _progress(title: str) -> Any:
    """A progress bar on standard error as a context manager that gives a function (done, total)."""
    import contextlib

    from rich.console import Console
    from rich.progress import Progress

    @contextlib.contextmanager
    def bar() -> Any:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


@app.command()
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A loralib file, a training checkpoint, or adapters to add up, FOLDER=WEIGHT.",
            metavar="SOURCE...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, or a .pt or .safetensors file for loralib.")],
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha that the layers were built with.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base MODEL: for an adapter's config, or to take one from.")
    ] = None,
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW for names, OLD a regular expression.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Regular expression of tensors to leave out.")] = None,
    merged: Annotated[
        list[str] | None, typer.Option(help="loralib's MergedLinear layers, as in c_attn=1,0,1 or qkv=64:1,16:0,16:1.")
    ] = None,
    conv: Annotated[list[str] | None, typer.Option(help="loralib's convolutions and kernels, as in conv1=3x3.")] = None,
    embedding: Annotated[str | None, typer.Option(help="Regular expression of loralib's embeddings.")] = None,
    fan_in_fan_out: Annotated[
        bool, typer.Option("--fan-in-fan-out", help="The model's layers store (in, out), as GPT-2's do.")
    ] = False,
    save_module: Annotated[list[str] | None, typer.Option(help="Module that was trained whole.")] = None,
    adapter_name: Annotated[str | None, typer.Option(help="Which of several adapters in a checkpoint.")] = None,
    mode: Annotated[SumMode | None, typer.Option(help="How adapters are added up: exactly, or roughly.")] = None,
    even: Annotated[bool, typer.Option("--even", help="Give all layers the same rank and alpha.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Store a model's weights as fp32.")] = False,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file of a model, as in 5GB.")] = None,
    as_json: Json = False,
) -> None:
    """Convert adapters between loralib and PEFT, add them up, and turn training checkpoints into folders."""
    from lory.adapters import convert as adapters
    from lory.adapters.merge import parse_size
    from lory.models.resolve import resolve

    options = adapters.Options(
        alpha=alpha,
        base=base,
        rename=tuple(rename or ()),
        ignore=tuple(ignore or ()),
        merged=tuple(merged or ()),
        conv=tuple(conv or ()),
        embedding=embedding,
        fan_in_fan_out=fan_in_fan_out,
        save_module=tuple(save_module or ()),
        adapter_name=adapter_name,
        mode=mode.value if mode else None,
        even=even,
        fp32=fp32,
        max_shard_bytes=parse_size(max_shard_size) if max_shard_size else None,
    )
    with _progress("Converting") as progress:
        done = adapters.convert(sources, out, options, lambda name: resolve(name).base_path, progress)
    if as_json:
        _print_json(done.to_dict())
        return
    what = (
        f"{done.layers} layers, ranks {', '.join(map(str, done.ranks))}, alpha {done.alpha:g}"
        if done.layers
        else (f"{done.files} file{'s' if done.files > 1 else ''} of weights")
    )
    print(f"{out}: {what} ({done.way}).")
    if done.left_out:
        print(f"Left out: {', '.join(done.left_out[:10])}{' ...' if len(done.left_out) > 10 else ''}")
    for note in done.notes:
        print(f"note: {note}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Runs; several are drawn into one picture.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; by default the run's own plots/.")] = None,
    as_json: Json = False,
) -> None:
    """Draw loss, learning rate, gradient norm and accuracy of one run or of several together."""
    from lory.models.resolve import find_run
    from lory.training.plots import plot_runs

    folders = [find_run(run) for run in runs]
    paths = plot_runs(folders, out or (folders[0] / "plots" if len(folders) == 1 else Path("plots")))
    if as_json:
        _print_json({"pictures": [str(path) for path in paths]})
    else:
        print("\n".join(str(path) for path in paths))


@app.command()
def demo(
    name: Annotated[str, typer.Option(help="The assistant's new name.")] = "Lory",
    author: Annotated[str, typer.Option(help="Who made it.")] = "Rainbow Lab",
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Give the embedded model a new identity on a CPU, and show what it says before and after."""
    from lory.training.demo import describe_demo, run_demo

    result = run_demo(name, author, out)
    if as_json:
        _print_json(result.to_dict())
    else:
        print(describe_demo(result.folder, out))


@configs_app.command("list")
def list_configs(
    pattern: Annotated[str, typer.Argument(help="Only names that match, as in *chat*.")] = "*", as_json: Json = False
) -> None:
    """List the bundled configs."""
    import fnmatch

    from lory.training.config import list_bundled

    found = {name: text for name, text in list_bundled().items() if fnmatch.fnmatch(name, pattern)}
    titles = {name: text.splitlines()[0].lstrip("# ") for name, text in found.items()}
    if as_json:
        _print_json(titles)
    else:
        for config, title in titles.items():
            print(f"{config:<20} {title}")


@configs_app.command("copy")
def copy_config(
    name: Annotated[str, typer.Argument(help="A bundled config's name.")],
    folder: Annotated[Path, typer.Argument(help="Folder to copy it to.")],
) -> None:
    """Copy a bundled config, to make it your own."""
    from lory.runtime import write_text
    from lory.training.config import list_bundled

    bundled = list_bundled()
    if name not in bundled:
        raise UsageError(f"'{name}' is not a bundled config; there are: {', '.join(bundled)}.")
    target = folder / f"{name}.yaml"
    if target.exists():
        raise UsageError(f"{target} exists already; delete it first, or choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} is no folder and cannot be made one: {error.strerror}.") from error
    write_text(target, bundled[name])
    print(target)


@configs_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a config, for editors."""
    from lory.training.config import Config

    _print_json(Config.model_json_schema())


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _print_version(wanted: bool) -> None:
    if wanted:
        from lory import __version__

        print(f"lory {__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say less.")] = False,
) -> None:
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Run the command line: a `LoryError` is one sentence and an exit code, never a traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    # so that what is half-written is cleared away, as after Ctrl-C; a training has a handler of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        app(prog_name="lory")
    except LoryError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
