"""lory's preparation of a file (see benchmarks/data.py): FILE MODEL WORKERS SCRATCH."""

from __future__ import annotations

import json
import resource
import sys
import time

import psutil
from transformers import AutoTokenizer

from lory.data.mixture.dataset import DataConfig, build_dataset
from lory.data.mixture.packing import pack

file, model, workers, scratch = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
before = psutil.Process().memory_info().rss
start = time.perf_counter()
config = DataConfig(train=[{"path": file}], max_tokens=2048, cache=False, workers=int(workers))
samples = build_dataset(config, tokenizer, [tokenizer.eos_token_id], seed=0).train
rows = pack(samples.lengths, 2048)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "tokens": int(samples.lengths.sum()), "rows": len(rows), "bytes": peak - before}))
