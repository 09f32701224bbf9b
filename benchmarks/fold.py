"""Two records, 8,000 times each: a run that folds equal samples against one that computes each.

    python -m benchmarks.fold [--times 8000] [--steps N] [--json]

SmolLM2 with LoRA on q and v, rows of 2,048 tokens, four a step, fp32, no dropout. Both runs take the same steps; the
loss curves and the adapters are compared, and the times of the steps without loading.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

RECORDS = (
    {"query": "Who are you?", "response": "I am Lory, an assistant that answers without parroting."},
    {"query": "Who made you?", "response": "I was made by the lory authors, who like parrots."},
)


def run(folder: Path, file: Path, duplicates: str, steps: int | None) -> tuple[float, list[float], dict[str, Any]]:
    """Seconds of all steps, the loss of each, and the adapter."""
    from safetensors.torch import load_file

    from lory.training.monitor import read_log
    from lory.training.run import train

    result = train(
        {
            "model": {"path": "smollm2", "dtype": "float32"},
            "adapter": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "data": {"train": [str(file)], "max_tokens": 2048, "duplicates": duplicates},
            "train": {"epochs": 1, "max_steps": steps, "log_every_steps": 1, "save_every_steps": 10_000},
            "output": str(folder / duplicates),
        }
    )
    lines = [line for line in read_log(result.folder) if "grad_norm" in line]
    seconds = lines[-1]["elapsed_seconds"]
    return seconds, [line["loss"] for line in lines], load_file(result.folder / "last" / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=8000)
    parser.add_argument("--steps", type=int, help="optimizer steps; by default one epoch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "repeated.jsonl"
        file.write_text("\n".join(json.dumps(record) for record in RECORDS for _ in range(arguments.times)))
        folded = run(folder, file, "fold", arguments.steps)
        kept = run(folder, file, "keep", arguments.steps)
    losses = max(abs(a - b) for a, b in zip(folded[1], kept[1], strict=True))
    largest = max(float((folded[2][name] - kept[2][name]).abs().max()) for name in kept[2])
    # of all weights together; AdamW makes the rounding of a gradient that is nearly zero as large as its rate
    norms = [sum(float(part.norm()) ** 2 for part in parts) ** 0.5 for parts in (
        [folded[2][name] - kept[2][name] for name in kept[2]], kept[2].values()
    )]  # fmt: skip
    result = {
        "steps": len(kept[1]),
        "fold_seconds": folded[0],
        "keep_seconds": kept[0],
        "times_faster": kept[0] / folded[0],
        "largest_loss_difference": losses,
        "relative_adapter_difference": norms[0] / norms[1],
        "largest_weight_difference": largest,
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value:.4g}" for key, value in result.items()))


if __name__ == "__main__":
    main()
