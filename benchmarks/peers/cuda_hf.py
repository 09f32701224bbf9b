"""Training steps of transformers' Trainer with PEFT, of TRL and of Unsloth on a random model, for `benchmarks.cuda`.

hf         padded batches, torch's fused attention
hf-liger   the same with Liger's kernels
hf-flash   the documents in one row without padding, flash-attn
trl        TRL's SFTTrainer, packed, flash-attn where it is installed
trl-liger  the same with Liger's kernels
unsloth    Unsloth's model in the Trainer, padded batches
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.random_models import (
    ALPHA,
    IGNORE,
    MAX_NORM,
    RANK,
    RATE,
    SHAPES,
    TARGETS,
    Document,
    Meter,
    draw_steps,
    make_model,
    make_tokenizer,
    start_alike,
)


def run(job: dict[str, Any], variant: str) -> dict[str, Any]:
    """Train as `variant` says."""
    device = torch.device(job["device"])
    steps = draw_steps(job["shape"], job["tokens"], job["steps"])
    meter = Meter(device)
    with tempfile.TemporaryDirectory() as folder:
        model = _unsloth_model(job, folder) if variant == "unsloth" else _peft_model(job, variant, device)
        start_alike(model)
        liger = variant.endswith("-liger")
        if variant.startswith("trl"):
            base, given = _trl_parts(job, steps, folder, liger)
        else:
            base, given = _trainer_parts(steps, folder, flat=variant == "hf-flash", liger=liger)
        _timed(base, meter)(model=model, **given).train()
    return meter.report(steps)


def _peft_model(job: dict[str, Any], variant: str, device: torch.device) -> Any:
    import peft

    flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    wants = variant == "hf-flash" or variant.startswith("trl")
    model = make_model(job["shape"], job["tokens"], device, "flash_attention_2" if flash and wants else None)
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[job["targets"]], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def _unsloth_model(job: dict[str, Any], folder: str) -> Any:
    from unsloth import FastLanguageModel

    # it loads from a folder only
    path = Path(folder) / "model"
    make_model(job["shape"], job["tokens"], torch.device(job["device"])).save_pretrained(path)
    make_tokenizer(path, SHAPES[job["shape"]][5])
    model, _ = FastLanguageModel.from_pretrained(
        str(path), max_seq_length=job["tokens"], dtype=torch.bfloat16, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=TARGETS[job["targets"]],
        use_gradient_checkpointing=False,
    )


def _arguments(folder: str, liger: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1_000_000,
        "gradient_checkpointing": False,
        "use_liger_kernel": liger,
    }
    if torch.cuda.is_available():
        return arguments | {"bf16": True}
    return arguments | {"use_cpu": True}


def _timed(base: type, meter: Meter) -> Callable[..., Any]:
    """What makes the trainer with its steps timed."""
    from transformers import TrainerCallback

    class Timed(base):  # type: ignore[misc, valid-type]
        def training_step(self, *given: Any, **named: Any) -> Any:
            meter.begin()
            loss = super().training_step(*given, **named)
            meter.losses.append(float(loss.detach()))
            return loss

    class Notes(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

    return functools.partial(Timed, callbacks=[Notes()])


def _trainer_parts(steps: list[list[Document]], folder: str, flat: bool, liger: bool) -> tuple[type, dict[str, Any]]:
    """The Trainer over one item a step, which is the step's documents."""
    import transformers

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    def collate(items: list[dict[str, list[Document]]]) -> dict[str, torch.Tensor]:
        documents = items[0]["documents"]
        if flat:
            # flash-attn finds the borders by the positions; a document's first token is predicted by nothing
            labels = [[IGNORE, *labels[1:]] for _, labels in documents]
            return {
                "input_ids": torch.tensor([[token for ids, _ in documents for token in ids]]),
                "labels": torch.tensor([[label for row in labels for label in row]]),
                "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None],
            }
        return {
            "input_ids": pad([ids for ids, _ in documents], 0),
            "labels": pad([labels for _, labels in documents], IGNORE),
            "attention_mask": pad([[1] * len(ids) for ids, _ in documents], 0),
        }

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = transformers.TrainingArguments(remove_unused_columns=False, **_arguments(folder, liger))
    items = [{"documents": documents} for documents in steps]
    return InOrder, {"args": config, "train_dataset": items, "data_collator": collate}


def _trl_parts(
    job: dict[str, Any], steps: list[list[Document]], folder: str, liger: bool
) -> tuple[type, dict[str, Any]]:
    import datasets
    import trl

    config = trl.SFTConfig(
        packing=True,
        max_length=job["tokens"],
        shuffle_dataset=False,
        max_steps=job["steps"],
        **_arguments(folder, liger),
    )
    rows = [{"input_ids": ids, "labels": labels} for documents in steps for ids, labels in documents]
    tokenizer = make_tokenizer(Path(folder), SHAPES[job["shape"]][5])
    data = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer, {"args": config, "train_dataset": data, "processing_class": tokenizer}
