"""Training on images with a frozen tower: what it saves that each image is encoded once.

    python -m benchmarks.vision [--images 48] [--epochs 3] [--json]

A random Qwen2-VL with about the proportions of the 2B one (a tower of 0.6 times the language model) and a LoRA on its
language part sees formula-sized pictures of 112 x 448 pixels, which are 64 tokens each. Each batch is computed twice,
with and without the cache, in turns; what counts is the processor's time, which other load on the machine changes
least. The weights stay as they are, so that both losses must be the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SIZE = (112, 448)
PATCH = 14


def make_model(folder: Path) -> None:
    """The random model with its processor, out of the tests' tokenizer."""
    import transformers as hf
    from tests.vision_models import MARKS, QWEN_IMAGES, make_tokenizer

    tokenizer = make_tokenizer(folder, MARKS, "<|vision_start|><|image_pad|><|vision_end|>")
    ids = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    config = hf.Qwen2VLConfig(
        text_config={
            "vocab_size": 340,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": rope,
        },
        vision_config={"depth": 8, "embed_dim": 192, "hidden_size": 256, "num_heads": 4, "patch_size": PATCH},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    hf.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    images = QWEN_IMAGES | {"patch_size": PATCH, "size": {"shortest_edge": 784, "longest_edge": 1_000_000}}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def write_records(folder: Path, count: int) -> Path:
    """Pictures, each with a question and an answer of a short formula's length."""
    from tests.vision_models import draw

    lines = []
    for number in range(count):
        draw(number, *SIZE).save(folder / f"{number}.png")
        messages = [{"role": "user", "content": "<image>LaTeX?"}, {"role": "assistant", "content": f"x _ {number} + 1"}]
        lines.append(json.dumps({"messages": messages, "images": [f"{number}.png"]}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(model: str, records: str, epochs: int) -> dict[str, Any]:
    """Tokens a second of processor time, epoch by epoch, with and without the cache."""
    from accelerate import Accelerator

    from lory.config import build
    from lory.models.matmul import choose_fp32_matmul
    from lory.models.vision_body import speed_up_tower
    from lory.training.checkpoint import Position
    from lory.training.config import Config
    from lory.training.feed import Batching, SampleFeed
    from lory.training.objective import Objective
    from lory.training.plan import NO_LEADING
    from lory.training.run import build_model, prepare
    from lory.training.sight import open_sight
    from lory.training.step import attention_for

    data = {"train": [{"path": records}], "max_tokens": 256}
    values = {"model": {"path": model}, "adapter": {"rank": 8}, "data": data, "train": {"batch_size": 4}}
    prepared = prepare(build(Config, values, "benchmark"))
    accelerator = Accelerator(cpu=True)
    choose_fp32_matmul(accelerator.device)
    net, _ = build_model(prepared, accelerator)
    plan = prepared.plan()
    feed = SampleFeed(prepared.dataset.train, plan, Batching(False, 0, NO_LEADING, True, 256, True), 10**9)
    speed_up_tower(net)
    sights = {name: open_sight(net, prepared.reader, gb) for name, gb in (("encoded", 0.0), ("cached", 1.0))}
    objectives = {name: Objective(net, sight=sight) for name, sight in sights.items()}
    with attention_for(net, warm := feed.take(Position(), 0)[0]):
        objectives["encoded"](warm).loss.backward()  # what is done once is not measured
    position, result = Position(), []
    for epoch in range(epochs):
        seconds, losses, tokens = dict.fromkeys(sights, 0.0), dict.fromkeys(sights, 0.0), 0
        while position.epoch == epoch:
            batches = feed.take(position, 0)
            tokens += sum(batch.tokens for batch in batches)
            for name in list(sights) if position.step % 2 else list(sights)[::-1]:
                start = time.process_time()
                for batch in batches:
                    loaded = sights[name].load(batch)
                    with attention_for(net, loaded):
                        loss = objectives[name](loaded).loss
                        loss.backward()
                    losses[name] += loss.item()
                seconds[name] += time.process_time() - start
                net.zero_grad()
            feed.advance(position)
        speeds = {name: tokens / seconds[name] for name in sights}
        result.append({"speeds": speeds, "losses": losses, "ratio": speeds["cached"] / speeds["encoded"]})
    for sight in sights.values():
        sight.close()
    return {"tokens": tokens, "epochs": result}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        make_model(folder / "model")
        found = measure(str(folder / "model"), str(write_records(folder, given.images)), given.epochs)
    if given.json:
        print(json.dumps(found))
        return
    for number, epoch in enumerate(found["epochs"], 1):
        speeds, losses = epoch["speeds"], epoch["losses"]
        print(
            f"epoch {number}: {speeds['encoded']:,.0f} tokens/s encoded each time, {speeds['cached']:,.0f} with the "
            f"cache ({epoch['ratio']:.2f} times); losses {losses['encoded']:.5f} and {losses['cached']:.5f}"
        )


if __name__ == "__main__":
    main()
