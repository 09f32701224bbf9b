"""Training with transformers' Trainer and PEFT, or with TRL's packed rows, a step at a time: JOB [--trl]."""

from __future__ import annotations

import sys
from typing import Any

import peft
import torch
import transformers
from benchmarks.peers.turns import (
    ADAPTERS,
    IGNORE,
    MAX_NORM,
    PAD,
    RATE,
    Clock,
    read_job,
    say,
    start_alike,
    wait_for_turn,
)

# TRL's packed rows
ROW_TOKENS = 1024


def main(path: str, packed: bool) -> None:
    """Train, a step for each line of standard input."""
    job = read_job(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
    rank, alpha, targets = ADAPTERS[job["targets"]]
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    start_alike(model)
    arguments: dict[str, Any] = {
        "output_dir": job["folder"],
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        "num_train_epochs": 100,
        "use_cpu": True,
        # TRL's own default is mixed precision
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1_000_000,
        "gradient_checkpointing": False,
    }
    base, given = trl_parts(job, arguments) if packed else hf_parts(job, arguments)
    seen: dict[str, Any] = {}

    class Timed(base):  # type: ignore[misc, valid-type]
        """Notes each batch's loss and tokens."""

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            labels = inputs["labels"]
            seen["tokens"], seen["supervised"] = count_tokens(labels, inputs.get("attention_mask"))
            result = super().compute_loss(model, inputs, *rest, **named)
            seen["loss"] = float((result[0] if isinstance(result, tuple) else result).detach())
            return result

    class Turns(transformers.TrainerCallback):  # type: ignore[misc]
        """A step for each line of standard input."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn()
            seen["clock"] = Clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            spent = seen.pop("clock").read()
            say(**spent, **seen)

    trainer = Timed(model=model, callbacks=[Turns()], **given)
    say()
    trainer.train()


def count_tokens(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[int, int]:
    """Real and supervised tokens of a batch."""
    real = labels.numel() if attention_mask is None else int(attention_mask.sum())
    return real, int((labels != IGNORE).sum())


def hf_parts(job: dict[str, Any], arguments: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """The Trainer over padded batches in the job's order, and what it is given."""

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    def collate(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": pad([s["input_ids"] for s in samples], PAD),
            "labels": pad([s["labels"] for s in samples], IGNORE),
            "attention_mask": pad([[1] * len(s["input_ids"]) for s in samples], 0),
        }

    class InOrder(transformers.Trainer):
        """The samples are shuffled already."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = transformers.TrainingArguments(per_device_train_batch_size=job["batch"], **arguments)
    return InOrder, {"args": config, "train_dataset": job["samples"], "data_collator": collate}


def trl_parts(job: dict[str, Any], arguments: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """TRL's trainer over packed rows, and what it is given."""
    import datasets
    import trl

    config = trl.SFTConfig(
        per_device_train_batch_size=1, packing=True, max_length=ROW_TOKENS, shuffle_dataset=False, **arguments
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    data = datasets.Dataset.from_list(job["samples"])
    return trl.SFTTrainer, {"args": config, "train_dataset": data, "processing_class": tokenizer}


if __name__ == "__main__":
    main(sys.argv[1], packed="--trl" in sys.argv)
