"""`lory data generate`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lory.cli.options import Json, print_json
from lory.runtime import UsageError

if TYPE_CHECKING:
    from lory.data.making.self_instruct import Tally

_DEFAULT_KEY = "OPENAI_API_KEY"


def generate(
    api: Annotated[str, typer.Option(help="Address of an OpenAI-compatible API, as in http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="The API's model.")],
    seeds: Annotated[str, typer.Option(help="Data to start from: a file, or whatever a config's source can be.")],
    out: Annotated[Path, typer.Option(help="File to write, FILE.jsonl; replies are kept in FILE.jsonl.journal.")],
    count: Annotated[int, typer.Option("-n", min=1, help="How many records.")] = 100,
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API's key.", metavar="NAME")
    ] = _DEFAULT_KEY,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="How freely the model writes.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longest reply; a longer answer is not taken.")] = 1024,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls at once.")] = 8,
    system: Annotated[str, typer.Option(help="System prompt of the answers and of the records.")] = "",
    language: Annotated[str, typer.Option(help="Language to write in; by default that of the seeds.")] = "",
    likeness: Annotated[
        float, typer.Option(min=0.05, max=1, help="Share of equal words and pairs that makes a near duplicate.")
    ] = 0.4,
    min_words: Annotated[int, typer.Option(min=1, help="Shortest answer.")] = 1,
    max_words: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 2000,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed call is made again.")] = 8,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for a reply.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Picks the examples that the prompts show.")] = 0,
    as_json: Json = False,
) -> None:
    """Write new instructions and answers through a chat API (self-instruct); run it again to go on after a stop."""
    from lory.data.making import self_instruct
    from lory.data.making.completions import Api

    if min_words > max_words:
        raise UsageError(f"--min-words {min_words} is above --max-words {max_words}; give a lower one.")
    if not (key := os.environ.get(key_env, "")) and key_env != _DEFAULT_KEY:
        raise UsageError(f"The environment variable {key_env} is not set; put the API's key there.")
    source = Api(api, model, key, temperature, max_tokens, timeout, retries)
    recipe = self_instruct.Recipe(
        self_instruct.read_seeds(seeds), count, system, language, likeness, (min_words, max_words), seed
    )
    with _progress(count) as show:
        tally = self_instruct.generate(source, recipe, out, concurrency, show)
    if as_json:
        print_json({"path": str(out), **tally.to_dict()})
        return
    print(f"{out}: {tally.accepted:,} records; {_count(tally)}")
    for reason, number in tally.rejected.most_common():
        print(f"  rejected {number:,}: {reason}")


def _count(tally: Tally) -> str:
    asked = f"{tally.asked:,} calls" + (f" (and {tally.replayed:,} from the journal)" if tally.replayed else "")
    return f"{asked}, {tally.prompt_tokens:,} tokens in and {tally.completion_tokens:,} out"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Tally], None]]:
    """A bar of accepted records on standard error, where a person looks at it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("accepted"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda tally: bar.update(task, completed=tally.accepted, description=_count(tally))
