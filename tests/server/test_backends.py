"""Other engines are given the same model, names, address and key; stand-ins on PATH show with what they are called."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import make_adapter, wait_until

from lory.cli import serve as command_line
from lory.cli.serve import Backend
from lory.runtime import LoryError, UsageError
from lory.server.backends import (
    Handover,
    find_gguf,
    hand_to_llama_cpp,
    prepare_vllm,
    why_vllm_cannot,
    write_llama_python_command,
    write_llama_server_command,
    write_vllm_command,
)

START = Handover(Path(), "tiny", "127.0.0.1", 8001)
SHOW = """#!{python}
import json, os, sys
keys = {{name: os.environ.get(name) for name in ("VLLM_API_KEY", "LLAMA_API_KEY")}}
json.dump({{"arguments": sys.argv[1:], "keys": keys}}, open({out!r}, "w"))
{then}
"""


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, then: str = "") -> Path:
    """Make a program of this name the only one found; the file where it writes its arguments."""
    folder.mkdir(exist_ok=True)
    out = folder / "called.json"
    (folder / name).write_text(SHOW.format(python=sys.executable, out=str(out), then=then))
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return out


def test_the_commands_are_written_as_the_engines_document_them() -> None:
    given = Handover(
        Path("/m"),
        "mine",
        "0.0.0.0",
        9000,
        key="secret",
        adapters={"a": Path("/a"), "b": Path("/b")},
        rank=20,
        dtype="bfloat16",
        batch=64,
        sees=True,
        tokenizer=Path("/t"),
    )
    assert write_vllm_command(given) == [
        *("vllm", "serve", "/m", "--served-model-name", "mine", "--host", "0.0.0.0", "--port", "9000"),
        *("--tokenizer", "/t", "--dtype", "bfloat16", "--max-num-seqs", "64"),
        *("--allowed-media-domains", "none.invalid"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "32", "--lora-modules", "a=/a", "b=/b"),
    ]
    assert write_llama_server_command(given) == [
        *("llama-server", "--model", "/m", "--alias", "mine", "--jinja", "--host", "0.0.0.0", "--port", "9000"),
        *("--parallel", "64"),
    ]
    assert write_llama_python_command(given) == [
        *(sys.executable, "-m", "llama_cpp.server", "--model", "/m", "--model_alias", "mine"),
        *("--host", "0.0.0.0", "--port", "9000", "--n_ctx", "0"),
    ]
    # other users of the machine see command lines
    assert "secret" not in repr(given)


def test_vllm_is_given_the_base_with_its_adapters(
    tiny_model: Path, adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = put_on_path(monkeypatch, tmp_path / "bin", "vllm")
    monkeypatch.setenv("LORY_API_KEY", "the-key")
    given = [f"{name}={adapters[name]}" for name in ("one", "two")]
    command_line.serve(str(tiny_model), adapter=given, backend=Backend.vllm, host="0.0.0.0", port=8123)
    called = json.loads(out.read_text())
    assert called["keys"]["VLLM_API_KEY"] == "the-key"
    assert called["arguments"] == [
        *("serve", str(tiny_model), "--served-model-name", tiny_model.name, "--host", "0.0.0.0", "--port", "8123"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", *given),
    ]


def test_an_adapter_alone_goes_beside_its_base_or_is_merged(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = put_on_path(
        monkeypatch, tmp_path / "bin", "vllm", "import shutil; shutil.copy(sys.argv[2] + '/config.json', '.')"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORY_API_KEY", raising=False)
    command_line.serve(str(tiny_adapter), name="mine", backend=Backend.vllm)
    arguments = json.loads(out.read_text())["arguments"]
    assert arguments[1:4] == [str(tiny_model), "--served-model-name", str(tiny_model)]
    assert arguments[arguments.index("--tokenizer") + 1] == str(tiny_adapter)
    assert arguments[-1] == f"mine={tiny_adapter}"
    dora = make_adapter(tiny_model, tmp_path / "dora", 1, type="dora")
    (tmp_path / "config.json").unlink()
    command_line.serve(str(dora), name="mine", backend=Backend.vllm)
    arguments = json.loads(out.read_text())["arguments"]
    assert arguments[2:4] == ["--served-model-name", "mine"]
    assert "--enable-lora" not in arguments
    # it was whole while the engine ran, and is gone now
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert not Path(arguments[1]).exists()


def test_what_vllm_would_answer_otherwise_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    made: dict[str, dict[str, Any]] = {
        "DoRA": {"type": "dora"},
        "as a whole": {"modules_to_save": ["lm_head"]},
        "it adapts": {"targets": ["lm_head", "q_proj"]},
    }
    for number, (reason, settings) in enumerate(made.items()):
        folder = make_adapter(tiny_model, tmp_path / str(number), 1, **settings)
        assert reason in why_vllm_cannot(folder)
        with pytest.raises(UsageError, match="serve it alone"):
            prepare_vllm(str(tiny_model), {"x": str(folder)}, START)
    plain = make_adapter(tiny_model, tmp_path / "plain", 1)
    assert why_vllm_cannot(plain) == ""
    with pytest.raises(UsageError, match="is an adapter itself"):
        prepare_vllm(str(plain), {"x": str(plain)}, START)
    with pytest.raises(UsageError, match="is a whole model"):
        prepare_vllm(str(tiny_model), {"x": str(tiny_model)}, START)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((tiny_model / name).read_bytes())
    template = (tiny_model / "chat_template.jinja").read_text()
    (plain / "chat_template.jinja").write_text(template)
    assert prepare_vllm(str(tiny_model), {"x": str(plain)}, START).rank == 3
    (plain / "chat_template.jinja").write_text(template.replace("\\n", " "))
    with pytest.raises(UsageError, match="template or tokenizer of its own"):
        prepare_vllm(str(tiny_model), {"x": str(plain)}, START)


def test_llama_cpp_is_given_a_gguf(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    out = put_on_path(monkeypatch, tmp_path / "bin", "llama-server")
    monkeypatch.setenv("LORY_API_KEY", "the-key")
    command_line.serve(str(tiny_model), name="t", backend=Backend.llama_cpp, gguf=gguf, max_batch=3, port=8124)
    called = json.loads(out.read_text())
    assert called["keys"]["LLAMA_API_KEY"] == "the-key"
    assert called["arguments"] == [
        *("--model", str(gguf), "--alias", "t", "--jinja", "--host", "127.0.0.1", "--port", "8124", "--parallel", "3")
    ]
    assert find_gguf("smollm2", None).suffix == ".gguf"
    assert find_gguf(str(gguf), None) == gguf


def test_a_gguf_that_is_not_there_is_said(tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no GGUF file"):
        find_gguf(str(tiny_model), None)
    with pytest.raises(UsageError, match="merge it with `lory merge`"):
        find_gguf(str(tiny_adapter), None)
    with pytest.raises(UsageError, match="does not exist"):
        find_gguf(str(tiny_model), tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"backend": Backend.vllm, "host": "0.0.0.0"}, "an API key is needed"),
        ({"backend": Backend.vllm, "kept_tokens": 5}, "--kept-tokens is for lory's own engine"),
        ({"backend": Backend.vllm, "max_tokens": 5}, "--max-tokens is for lory's own engine"),
        ({"backend": Backend.vllm, "device": "cpu"}, "--device is for"),
        ({"backend": Backend.vllm, "allow_image_links": True}, "--allow-image-links is for"),
        ({"backend": Backend.vllm, "gguf": Path("x.gguf")}, "--gguf is for --backend llama-cpp"),
        ({"gguf": Path("x.gguf")}, "--gguf is for --backend llama-cpp"),
        ({"backend": Backend.llama_cpp, "adapter": ["a=b"]}, "--adapter is for"),
        ({"backend": Backend.vllm}, "pip install vllm"),
        ({"backend": Backend.llama_cpp, "gguf": Path(__file__)}, "llama-cpp-python"),
    ],
)
def test_what_cannot_be_handed_over_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], sentence: str
) -> None:
    monkeypatch.delenv("LORY_API_KEY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UsageError, match=sentence):
        command_line.serve(str(tiny_model), **arguments)


def test_an_engine_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(monkeypatch, tmp_path / "bin", "llama-server", "sys.exit(3)")
    with pytest.raises(LoryError, match="llama-server ended with status 3"):
        hand_to_llama_cpp(START)


def test_a_signal_reaches_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = put_on_path(monkeypatch, tmp_path / "bin", "llama-server", "import time; time.sleep(60)")

    def stop() -> None:
        wait_until(out.exists, 30)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    before = signal.getsignal(signal.SIGTERM)
    hand_to_llama_cpp(START)
    assert signal.getsignal(signal.SIGTERM) is before
