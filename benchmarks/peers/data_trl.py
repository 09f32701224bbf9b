"""TRL's preparation of a file (see benchmarks/data.py): FILE MODEL WORKERS SCRATCH."""

from __future__ import annotations

import json
import resource
import sys
import time

import psutil
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

file, model, workers, scratch = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
tiny = AutoModelForCausalLM.from_pretrained(model)


def to_chat(record: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    question = "\n".join(part for part in (record["instruction"], record["input"]) if part)
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": record["output"]}],
    }


before = psutil.Process().memory_info().rss
start = time.perf_counter()
data = load_dataset("json", data_files=file, split="train")
data = data.map(to_chat, remove_columns=data.column_names, num_proc=int(workers))
config = SFTConfig(
    output_dir=scratch, packing=True, packing_strategy="bfd", max_length=2048, dataset_num_proc=int(workers),
    report_to="none", use_cpu=True, bf16=False,
)  # fmt: skip
rows = SFTTrainer(tiny, args=config, train_dataset=data, processing_class=tokenizer).train_dataset
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokens = sum(len(ids) for ids in rows["input_ids"])
print(json.dumps({"seconds": seconds, "tokens": tokens, "rows": len(rows), "bytes": peak - before}))
