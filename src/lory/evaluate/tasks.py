"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval) over a model that lory has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.adapters.prompt import virtual_length
from lory.runtime import UsageError

if TYPE_CHECKING:
    from lory.assistant import Assistant

INSTALL = "pip install 'lm-eval>=0.4.9'"


def run_tasks(
    assistant: Assistant,
    tasks: Sequence[str],
    most_records: int | None = None,
    batch_size: int = 8,
    folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Each task's scores, as lm-eval names them.

    Args:
        most_records: of each task; None: all.
        folder: where tasks of one's own are described.

    Raises:
        UsageError: lm-eval is missing, it knows no such task, or the model has a soft prompt, which it would not see.
    """
    if virtual_length(assistant.model):
        raise UsageError("lm-eval would run the model without its soft prompt; evaluate it with --data instead.")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder} is no folder; --include-path is a folder with tasks of lm-eval's.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-eval, which is not installed; to install it: {INSTALL}") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UsageError(f"lm-eval knows no task '{unknown[0]}'; `lm-eval ls tasks` lists those that there are.")
    model = HFLM(pretrained=assistant.model, tokenizer=assistant.tokenizer, backend="causal", batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), limit=most_records, task_manager=manager, log_samples=False
    )
    return {task: dict(scores) for task, scores in found["results"].items()}
