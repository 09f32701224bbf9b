"""Merging an adapter into its base: `lory merge` and PEFT's merge_and_unload with save_pretrained.

    python -m benchmarks.merge [--gigabytes 1] [--shards 4] [--rounds 1] [--folder DIR] [--json]

A Llama of about that size is made on the spot, in bf16 and several shards, with an adapter on all its linear layers.
Each merge runs in a process of its own, in turn; the time is that of the merge and the writing without the imports, and
the memory the process's peak beyond what it held before. The two results are compared tensor by tensor. A plain copy of
the files tells what the disk allows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TOOLS = ("lory", "peft")
RANK, ALPHA = 16, 32


def make_model(folder: Path, gigabytes: float, shards: int) -> None:
    """Write base and adapter; the base is written a shard at a time, so that any size can be made."""
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers = 1024, 1
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    # attention: q and o, k and v of half the size; feed-forward: three of four times the size
    a_layer = 2 * (3 * hidden**2 + 12 * hidden**2)
    config.num_hidden_layers = max(1, round(gigabytes * 1e9 / a_layer))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config.save_pretrained(base)
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=-(-sum(sizes.values()) // shards),
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: torch.randn(shapes[name]).mul_(0.02).to(torch.bfloat16) for name in names}
        save_file(tensors, base / file, {"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    write_adapter(adapter, base, {name: shape for name, shape in shapes.items() if "_proj." in name})


def write_adapter(folder: Path, base: Path, shapes: dict[str, Any]) -> None:
    """A random adapter in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.split(".")[-2] for name in shapes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_with_lory(base: Path, adapter: Path, out: Path, shard_bytes: int) -> None:
    """What `lory merge` does, without its comparison of logits, which PEFT has no counterpart of."""
    from lory.adapters.merge import merge_shards

    out.mkdir()
    merge_shards(base, adapter, out, max_shard_bytes=shard_bytes)


def merge_with_peft(base: Path, adapter: Path, out: Path, shard_bytes: int) -> None:
    """Load, merge, save, as PEFT's documentation has it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size=shard_bytes)


def measure(tool: str, folder: Path, out: Path, shard_bytes: int) -> dict[str, float]:
    """Run one merge in this process: seconds, and the peak of resident memory beyond what the imports hold."""
    import psutil

    # before the clock starts; both need the model's class, so neither pays for its import
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lory.adapters.merge  # noqa: F401

    if tool == "peft":
        import peft  # noqa: F401
    process, done, peak = psutil.Process(), threading.Event(), [0, 0]
    before = process.memory_info()

    def watch() -> None:
        while not done.wait(0.01):
            now = process.memory_info()
            peak[0] = max(peak[0], now.rss - before.rss)
            # pages of a mapped file that the system can drop at any time count as `shared`
            peak[1] = max(peak[1], (now.rss - now.shared) - (before.rss - before.shared))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    (merge_with_lory if tool == "lory" else merge_with_peft)(folder / "base", folder / "adapter", out, shard_bytes)
    os.sync()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak_bytes": peak[0], "peak_own_bytes": peak[1]}


def measure_apart(tool: str, folder: Path, out: Path, shard_bytes: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.merge", "--measure", tool, "--folder", str(folder), "--out", str(out)]
    command += ["--shard-bytes", str(shard_bytes)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def time_copy(base: Path, out: Path) -> float:
    """Seconds that the disk takes for the same bytes."""
    start = time.perf_counter()
    shutil.copytree(base, out)
    os.sync()
    return time.perf_counter() - start


def compare(one: Path, other: Path) -> dict[str, float]:
    """Tensors that differ, and the largest difference relative to the largest value."""
    from safetensors import safe_open

    def index(folder: Path) -> dict[str, Path]:
        names = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names |= dict.fromkeys(file.keys(), path)
        return names

    ours, theirs = index(one), index(other)
    if ours.keys() != theirs.keys():
        raise SystemExit(f"The two merged models differ in {sorted(ours.keys() ^ theirs.keys())[:3]}.")
    unequal, worst = 0, 0.0
    for name in ours:
        with safe_open(ours[name], framework="pt") as a, safe_open(theirs[name], framework="pt") as b:
            left, right = a.get_tensor(name).float(), b.get_tensor(name).float()
        difference = float((left - right).abs().max() / right.abs().max())
        unequal, worst = unequal + (difference > 0), max(worst, difference)
    return {"tensors": len(ours), "unequal": unequal, "largest_relative_difference": worst}


def run(folder: Path, gigabytes: float, shards: int, rounds: int) -> dict[str, Any]:
    """Make the model, merge it with both tools in turn, and compare what came out."""
    make_model(folder, gigabytes, shards)
    files = sorted((folder / "base").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    shard_bytes = max(path.stat().st_size for path in files)
    results: dict[str, Any] = {"bytes": size, "shards": len(files), "copy_seconds": [], **{tool: [] for tool in TOOLS}}
    for turn in range(rounds):
        results["copy_seconds"].append(time_copy(folder / "base", folder / "copy"))
        shutil.rmtree(folder / "copy")
        for place in range(len(TOOLS)):
            tool = TOOLS[(turn + place) % len(TOOLS)]
            shutil.rmtree(folder / tool, ignore_errors=True)
            results[tool].append(measure_apart(tool, folder, folder / tool, shard_bytes))
    results["agreement"] = compare(folder / "lory", folder / "peft")
    return results


def print_table(results: dict[str, Any]) -> None:
    """The results for people."""
    print(f"{results['bytes'] / 1e9:.2f} GB in {results['shards']} shards")
    print(f"{'':<8} {'seconds':>8} {'peak GB':>8} {'without mapped files':>21}")
    for tool in TOOLS:
        for turn in results[tool]:
            peak, own = turn["peak_bytes"] / 1e9, turn["peak_own_bytes"] / 1e9
            print(f"{tool:<8} {turn['seconds']:8.2f} {peak:8.2f} {own:21.2f}")
    print(f"{'copy':<8} {min(results['copy_seconds']):8.2f}")
    agreement = results["agreement"]
    print(
        f"{agreement['unequal']} of {agreement['tensors']} tensors differ, by at most "
        f"{agreement['largest_relative_difference']:.1e} of the largest value (bf16 rounds to 3.9e-3)"
    )


def main() -> None:
    """Run, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the models are made; three times their size is needed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard-bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        result = measure(arguments.measure, arguments.folder, arguments.out, arguments.shard_bytes)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        results = run(Path(name), arguments.gigabytes, arguments.shards, arguments.rounds)
    if arguments.json:
        print(json.dumps(results))
    else:
        print_table(results)


if __name__ == "__main__":
    main()
