"""Shared fixtures: a tiny random model made on the spot, and the real SmolLM2."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.sizes import TINY

from lory.runtime import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two threads on two cores collapse when anything else runs; one is steady
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"


def use_own_cache() -> None:
    """A cache for these tests alone, but for the converted model, which takes long to make."""
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="lory-tests-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    (own / "models").symlink_to(models.resolve())
    os.environ["LORY_CACHE"] = str(own)


use_own_cache()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Who are you? I am an assistant, and I answer questions.",
    "Two and two is four; seven times six is forty-two.",
    "The quick brown fox jumps over the lazy dog. 你好，世界！",
]


def make_tokenizer(folder: Path, template: str = CHATML) -> None:
    """A small byte-level BPE tokenizer with ChatML marks, saved in HF's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def make_llama(folder: Path, seed: int = 0, **changes: object) -> None:
    """A random Llama with grouped-query attention and odd sizes, saved in HF's format with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes)))
    # transformers' own start is too small for differences to show
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer(folder)


def make_circling(model: Any, tokenizer: Any) -> list[int]:
    """Let a model say the same nine words in turn, for ever; the words' tokens."""
    words = [n for n in range(len(tokenizer)) if (t := tokenizer.decode([n]).strip()).isalpha() and len(t) > 1][:9]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        for place, word in enumerate(words):
            model.get_input_embeddings().weight[word, place] = 1.0
            model.get_output_embeddings().weight[words[(place + 1) % 9], place] = 1.0
            # what it could say instead
            model.get_output_embeddings().weight[len(tokenizer) - 1 - place, place] = 0.9
    return words


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of two layers; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_llama(folder)
    return folder


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family in `tests.vision_models` to the folder of a tiny model of it; do not write into it."""

    @functools.cache
    def make(family: str) -> Path:
        from tests.vision_models import SERVED

        folder = tmp_path_factory.mktemp(family)
        SERVED[family](folder)
        return folder

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M-Instruct, converted once into lory's cache."""
    from lory.models.embedded import prepare_smollm2

    return prepare_smollm2()


SIZES = TINY | {"vocab_size": 131, "max_position_embeddings": 64}


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """A function that makes a random model of two layers: `random_model("Gemma2", sliding_window=4)`."""

    def make(family: str, **changes: object) -> Any:
        import transformers

        config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 24 short questions and answers of uneven lengths; do not write to it."""
    path = tmp_path_factory.mktemp("records") / "sums.jsonl"
    lines = []
    for a in range(24):
        answer = f"It is {a + 7}." + " I am sure." * (a % 4)
        messages = [{"role": "user", "content": f"{a} and 7?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_run(tiny_model: Path, records: Path, tmp_path: Path) -> dict[str, Any]:
    """The config of a run of 12 steps in `tmp_path`/runs, with dropout, accumulation and a checkpoint every 3 steps."""
    return {
        "model": {"path": str(tiny_model)},
        "adapter": {"rank": 3, "alpha": 6, "dropout": 0.1},
        "data": {"train": [{"path": str(records)}], "max_tokens": 96, "packing": False},
        "train": {
            "epochs": 2,
            "batch_size": 2,
            "accumulate": 2,
            "learning_rate": 1e-2,
            "log_every_steps": 1,
            "save_every_steps": 3,
        },
        "output": str(tmp_path / "runs"),
    }


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-3 adapter on `tiny_model`, random and large enough to change every answer; do not write into it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lory.adapters.files import save_adapter
    from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora

    folder = tmp_path_factory.mktemp("tiny-adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    attach_lora(model, AdapterConfig(rank=3, alpha=7))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_A.normal_(std=0.3, generator=generator)
            layer.lora_B.normal_(std=0.3, generator=generator)
    save_adapter(model, folder, str(tiny_model))
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


# How the chat templates of model families differ, as (template, its marks, its terminators). None: the tokenizer's own.
TEMPLATES: dict[str, tuple[str | None, tuple[str, ...], tuple[str, ...]]] = {
    "smollm2": (None, (), ("<|im_end|>",)),
    "chatml": (CHATML, (), ("<|im_end|>",)),
    # trims contents, and a model of this family has several terminators
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    # has no system role
    "gemma": (
        "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
        "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
        ("<eos>", "<end_of_turn>"),
    ),
    # takes the thinking out of earlier answers
    "qwen3": (
        "{% for message in messages %}{% set content = message['content'] %}"
        "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        (),
        ("<|im_end|>",),
    ),
    # opens an answer with a thinking mark that a finished answer lacks
    "thinks": (
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"),
        ("<think>", "</think>"),
        ("<|im_end|>",),
    ),
    # closes the whole conversation with a second terminator
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    # writes no terminator
    "bare": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        (),
        ("<|im_end|>",),
    ),
}


@pytest.fixture(scope="session")
def chat_tokenizer(smollm2: Path) -> Callable[[str], tuple[PreTrainedTokenizerBase, tuple[int, ...]]]:
    """A function from a name in `TEMPLATES` to SmolLM2's tokenizer with it, not to be changed, and its terminators."""

    @functools.cache
    def make(name: str) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
        from tokenizers import AddedToken
        from transformers import AutoTokenizer

        template, marks, ends = TEMPLATES[name]
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
        return tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(ends)))

    return make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, small_run: dict[str, Any]) -> dict[str, Any]:
    """The small run without its pictures, which take longer than all else."""
    monkeypatch.setattr("lory.training.run.plot_runs", lambda *_: [])
    return small_run
