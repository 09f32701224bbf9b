"""Sample chats: the same prompts answered again and again while a model learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from lory.assistant import Assistant
from lory.config import Section
from lory.data.vision.reader import ImageReader
from lory.generate import GenerationOptions
from lory.metrics.repetition import repetition_scores
from lory.runtime import explain_os_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SamplesConfig(Section):
    """Prompts that are answered before training, every so many steps, and at the end."""

    prompts: list[str] = Field(default=[], description="Questions to answer, each in a conversation of its own.")
    every_steps: int = Field(500, ge=1, description="Optimizer steps between two rounds of answers.")
    system: str | None = Field(None, description="System prompt of these conversations.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer, in tokens.")


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplesConfig,
    step: int,
    folder: Path,
    say: Callable[[str], None],
    reader: ImageReader | None = None,
) -> None:
    """Answer the prompts greedily, show the answers, and append them with their repetition scores to samples.jsonl."""
    if not config.prompts:
        return
    training = model.training
    model.eval()
    say(f"step {step}  sample chats")
    try:
        # a draw here must not change what training draws next
        with torch.random.fork_rng():
            assistant = Assistant(model, tokenizer, reader=reader)
            for prompt in config.prompts:
                _answer(assistant, config, prompt, step, folder, say)
    finally:
        model.train(training)


def _answer(
    assistant: Assistant, config: SamplesConfig, prompt: str, step: int, folder: Path, say: Callable[[str], None]
) -> None:
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": prompt})
    ids = assistant.answer_ids(messages, GenerationOptions(max_new_tokens=config.max_new_tokens))
    answer = assistant.tokenizer.decode(ids, skip_special_tokens=True)
    scores = repetition_scores(ids)
    say(f"  > {prompt}\n    {answer}")
    entry = {"step": step, "prompt": prompt, "answer": answer, "tokens": len(ids), "repetition": scores}
    path = folder / "samples.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    except OSError as error:
        raise explain_os_error(error, f"write {path}") from error
