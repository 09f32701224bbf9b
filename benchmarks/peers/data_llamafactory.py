"""LLaMA-Factory's preparation of a file (see benchmarks/data.py): FILE MODEL WORKERS SCRATCH."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import psutil
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from transformers import AutoTokenizer

file, model, workers, scratch = sys.argv[1:]
info = {"records": {"file_name": Path(file).name}}
(Path(file).parent / "dataset_info.json").write_text(json.dumps(info))
settings = {
    "model_name_or_path": model,
    "stage": "sft",
    "do_train": True,
    "dataset": "records",
    "dataset_dir": str(Path(file).parent),
    "template": "smollm2",
    "cutoff_len": 2048,
    "packing": True,
    "neat_packing": True,
    "preprocessing_num_workers": int(workers),
    "overwrite_cache": True,
    "output_dir": scratch,
    "report_to": "none",
    "use_cpu": True,
}
model_args, data_args, training_args, _, _ = get_train_args(settings)
tokenizer = AutoTokenizer.from_pretrained(model)
template = get_template_and_fix_tokenizer(tokenizer, data_args)
before = psutil.Process().memory_info().rss
start = time.perf_counter()
rows = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)["train_dataset"]
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokens = sum(sum(mask > 0 for mask in masks) for masks in rows["attention_mask"])
print(json.dumps({"seconds": seconds, "tokens": tokens, "rows": len(rows), "bytes": peak - before}))
