"""Random models of Llama's shapes and random documents, the same in every process (torch and transformers alone)."""

from __future__ import annotations

import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

IGNORE = -100
RANK, ALPHA, RATE, MAX_NORM = 16, 32, 2e-4, 1.0
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# hidden, inner, layers, heads, heads of keys, vocabulary, tied head: Llama 3.2 1B, Llama 3.1 8B, and one for trying out
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "8b": (4096, 14_336, 32, 32, 8, 128_256, False),
    "tiny": (64, 96, 2, 4, 2, 512, False),
}
Document = tuple[list[int], list[int]]
"""Ids and labels."""


def make_config(shape: str, context: int) -> Any:
    """The transformers config of a shape."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads, groups, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=max(context, 2048),
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_model(shape: str, context: int, device: torch.device, attention: str | None = None) -> Any:
    """The model in bf16 (fp32 on a CPU), with the same weights in every process of a machine."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    more = {"attn_implementation": attention} if attention else {}
    with device:
        model = AutoModelForCausalLM.from_config(make_config(shape, context), dtype=dtype, **more)
    return model.requires_grad_(False)


def start_alike(model: Any) -> None:
    """Fill A and B, whose order is the model's in every library, with the same numbers; B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def draw_steps(shape: str, tokens: int, steps: int) -> list[list[Document]]:
    """For each step documents of uneven lengths that fill `tokens`; the first third of each is not learnt."""
    vocabulary, draw = SHAPES[shape][5], random.Random(0)
    result = []
    for _ in range(steps):
        documents: list[Document] = []
        left = tokens
        while left:
            length = min(left, max(4, round(draw.lognormvariate(5.6, 0.8))))
            # a rest of a few tokens goes to the document before it
            length = left if left - length < 4 else length
            ids = [draw.randrange(3, vocabulary) for _ in range(length)]
            documents.append((ids, [IGNORE] * (length // 3) + ids[length // 3 :]))
            left -= length
        result.append(documents)
    return result


class Meter:
    """Seconds and loss of each step, and the peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.losses = device, [], []
        self.start = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._wait()
        self.start = time.perf_counter()

    def end(self) -> None:
        """The step ends."""
        self._wait()
        self.seconds.append(time.perf_counter() - self.start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def report(self, documents: list[list[Document]]) -> dict[str, Any]:
        """What one JSON line tells."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        tokens = [sum(len(ids) for ids, _ in step) for step in documents]
        return {"seconds": self.seconds, "losses": self.losses, "tokens": tokens, "peak_bytes": peak}


def make_tokenizer(folder: Path, vocabulary: int) -> Any:
    """A tokenizer of this many made-up words, for trainers that want one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer
