"""Merged is the same as unmerged, in shards, and a merge that cannot be right is refused before anything is written."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lory.adapters import merge
from lory.adapters.files import AdapterFiles, save_adapter
from lory.adapters.inject import AdapterConfig, attach_lora
from lory.adapters.merge import MergeReport, merge_shards, parse_size
from lory.lora.functional import delta_weight
from lory.runtime import LoryError, UsageError

SHARD_BYTES = 6_000
IDS = torch.tensor([[1, 5, 9, 30, 2]])


def make_base(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "6KB", tied: bool = False) -> Path:
    """A Llama of odd sizes (hidden 12, feed-forward 22, vocabulary 37) with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=12,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(folder: Path, base: Path, **settings: Any) -> Tensor:
    """A rank-3, alpha-7 adapter with random weights for `base`, saved; returns the adapted model's logits."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    attach_lora(model, AdapterConfig(rank=3, alpha=7, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    folder.mkdir(exist_ok=True)
    save_adapter(model, folder, str(base))
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits


def load_logits(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())


def read_weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    make_adapter(tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("shard", ["6KB", "1GB"])
def test_merged_model_gives_the_adapted_models_logits(tmp_path: Path, out: Path, shard: str) -> None:
    base = make_base(tmp_path / "base", shard=shard)
    expected = make_adapter(tmp_path / "adapter", base)
    assert (expected - load_logits(base)).abs().max() > 0.1
    report = merge_shards(base, tmp_path / "adapter", out)
    torch.testing.assert_close(load_logits(out), expected, rtol=0, atol=1e-5)
    weights = read_weights(out)
    size = sum(tensor.nbytes for tensor in weights.values())
    assert report == MergeReport(tensors=len(weights), merged=14, shards=1, bytes=size)


def test_every_other_tensor_is_the_bases_bit_for_bit(base: Path, adapter: Path, out: Path) -> None:
    merge_shards(base, adapter, out)
    before, after, adapted = read_weights(base), read_weights(out), set(AdapterFiles(adapter).modules)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (name.removesuffix(".weight") not in adapted), name


def test_a_bf16_weight_is_added_in_fp32_and_rounded_once(tmp_path: Path, out: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    make_adapter(tmp_path / "adapter", base)
    merge_shards(base, tmp_path / "adapter", out)
    before, after, files = read_weights(base), read_weights(out), AdapterFiles(tmp_path / "adapter")
    for module in files.modules:
        delta = delta_weight(*files.factors(module), files.scaling(module))
        expected = (before[f"{module}.weight"].float() + delta).to(torch.bfloat16)
        assert torch.equal(after[f"{module}.weight"], expected)


def test_an_fp64_base_is_merged_in_fp64(tmp_path: Path, out: Path) -> None:
    base = make_base(tmp_path / "base", torch.float64)
    expected = make_adapter(tmp_path / "adapter", base)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.float64}
    merge_shards(base, tmp_path / "adapter", out)
    torch.testing.assert_close(load_logits(out), expected, rtol=0, atol=1e-12)


def test_a_cast_changes_floats_only_and_is_named_in_the_config(base: Path, adapter: Path, out: Path) -> None:
    edit_json(base / "config.json", torch_dtype="float32", inner={"dtype": "float32", "hidden_size": 12})
    file = sorted(base.glob("model-*.safetensors"))[0]
    save_file(load_file(file) | {"steps": torch.tensor([3])}, file)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["steps"] = file.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    plain = out.with_name("plain")
    plain.mkdir()
    merge_shards(base, adapter, plain)
    merge_shards(base, adapter, out, dtype=torch.bfloat16)
    exact, cast = read_weights(plain), read_weights(out)
    assert torch.equal(cast["steps"], torch.tensor([3]))
    assert cast["steps"].dtype == torch.int64
    assert all(torch.equal(cast[name], exact[name].to(torch.bfloat16)) for name in exact if name != "steps")
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == config["inner"]["dtype"] == "bfloat16"
    assert config["inner"]["hidden_size"] == 12
    assert json.loads((plain / "config.json").read_text())["dtype"] == "float32"


def test_a_value_that_overflows_in_the_cast_is_not_written_as_infinity(base: Path, adapter: Path, out: Path) -> None:
    file = next(path for path in base.glob("model-*") if "model.norm.weight" in load_file(path))
    save_file(load_file(file) | {"model.norm.weight": torch.full((12,), 1e6)}, file)
    with pytest.raises(LoryError, match=r"'model\.norm\.weight' has values too large for torch\.float16"):
        merge_shards(base, adapter, out, dtype=torch.float16)
    merge_shards(base, adapter, out, dtype=torch.bfloat16)


def test_shards_keep_to_the_limit_and_the_index_names_each_tensors_file(base: Path, adapter: Path, out: Path) -> None:
    report = merge_shards(base, adapter, out, max_shard_bytes=1_500)
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    assert report.shards == len(files) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == report.bytes
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 1_500 or len(sizes) == 1
    assert any(tensor.nbytes > 1_500 for tensor in read_weights(out).values())


def test_one_shard_is_in_memory_at_a_time(
    base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    sizes = []

    def save(tensors: dict[str, Tensor], *arguments: Any, **options: Any) -> None:
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, *arguments, **options)

    def check(done: int, total: int) -> None:
        assert not any(reference() is not None for reference in alive), "the shard before is held while this one fills"

    monkeypatch.setattr(merge, "save_file", save)
    report = merge_shards(base, adapter, out, max_shard_bytes=SHARD_BYTES, progress=check)
    assert len(sizes) == report.shards > 2
    assert max(sizes) <= SHARD_BYTES
    assert sum(sizes) == report.bytes


def test_peft_merges_to_the_same_weights(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel

    merge_shards(base, adapter, out)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    torch.testing.assert_close(read_weights(out), dict(peft.state_dict()), rtol=0, atol=1e-6)


def test_progress_counts_every_tensor(base: Path, adapter: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = merge_shards(base, adapter, out, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, report.tensors) for i in range(report.tensors)]


def test_the_weights_are_as_readable_as_the_config(base: Path, adapter: Path, out: Path) -> None:
    merge_shards(base, adapter, out)
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_companions_are_copied_and_nothing_else(base: Path, adapter: Path, out: Path) -> None:
    copied = ["generation_config.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.json", "LICENSE", "x.py"]
    left = [
        "README.md",
        "README.txt",
        "pytorch_model.bin",
        "MANIFEST.json",
        "adapter_config.json",
        "log.jsonl",
        "a.gguf",
    ]
    for name in copied + left:
        (base / name).write_text(f"{name} of the base")
    (base / "onnx").mkdir()
    (base / "onnx" / "config.json").write_text("{}")
    (adapter / "tokenizer.json").write_text("trained with")
    (adapter / "README.md").write_text("the adapter's")
    merge_shards(base, adapter, out)
    assert {path.name for path in out.iterdir()} == {*copied, "config.json", "model.safetensors"}
    assert (out / "tokenizer.json").read_text() == "trained with"
    assert (out / "vocab.json").read_text() == "vocab.json of the base"


def test_what_overrides_a_tokenizer_config_comes_from_the_adapter_too(base: Path, adapter: Path, out: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (base / name).write_text('{"pad_token": "old"}')
    (adapter / "tokenizer_config.json").write_text('{"pad_token": "new"}')
    merge_shards(base, adapter, out)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"pad_token": "new"}
    assert not (out / "special_tokens_map.json").exists()
    assert (out / "chat_template.jinja").exists()  # the adapter brings none


@pytest.mark.parametrize("in_config", [True, False])
def test_the_adapters_chat_template_is_the_only_one(base: Path, adapter: Path, out: Path, in_config: bool) -> None:
    (base / "chat_template.jinja").write_text("old")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "new"} if in_config else {}))
    if not in_config:
        (adapter / "chat_template.jinja").write_text("new")
    merge_shards(base, adapter, out)
    template = out / "chat_template.jinja"
    assert not template.exists() if in_config else template.read_text() == "new"


def refused(base: Path, adapter: Path, out: Path, match: str, **options: Any) -> None:
    with pytest.raises(UsageError, match=match):
        merge_shards(base, adapter, out, **options)
    assert not list(out.iterdir())


def test_a_module_without_a_weight_in_the_base_is_refused(base: Path, adapter: Path, out: Path) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = base / index["weight_map"].pop(name)
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(base, adapter, out, r"'model\.layers\.1\.mlp\.up_proj\.weight'.*no such weight")


def test_an_adapted_tied_head_of_a_model_of_its_own_code_is_refused(tmp_path: Path, out: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    make_adapter(tmp_path / "adapter", base, targets=["lm_head"])
    edit_json(base / "config.json", model_type="own", architectures=["OwnForCausalLM"])
    refused(base, tmp_path / "adapter", out, r"'lm_head\.weight', which is tied to the embeddings")


def test_a_model_of_its_own_code_is_merged_by_names(base: Path, adapter: Path, out: Path) -> None:
    plain = out.with_name("plain")
    plain.mkdir()
    merge_shards(base, adapter, plain)
    edit_json(base / "config.json", model_type="own", architectures=["OwnForCausalLM"])
    merge_shards(base, adapter, out)
    expected, found = read_weights(plain), read_weights(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "settings", [{"targets": ["lm_head"]}, {"targets": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}]
)
def test_tied_weights_that_come_to_differ_are_untied_explicitly(
    tmp_path: Path, out: Path, settings: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", tied=True)
    expected = make_adapter(tmp_path / "adapter", base, **settings)
    report = merge_shards(base, tmp_path / "adapter", out)
    torch.testing.assert_close(load_logits(out), expected, rtol=0, atol=1e-5)
    weights = read_weights(out)
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert report.tensors == len(weights) == len(read_weights(base)) + 1
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_weights_that_nothing_changes_stay_tied(tmp_path: Path, out: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    make_adapter(tmp_path / "adapter", base)
    merge_shards(base, tmp_path / "adapter", out)
    assert "lm_head.weight" not in read_weights(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_head_that_is_stored_beside_its_embeddings_keeps_its_values(tmp_path: Path, out: Path) -> None:
    base = make_base(tmp_path / "base", shard="1GB", tied=True)
    file = base / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.randn(37, 12)}, file, metadata={"format": "pt"})
    expected = make_adapter(tmp_path / "adapter", base, targets=["embed_tokens"])
    merge_shards(base, tmp_path / "adapter", out)
    torch.testing.assert_close(load_logits(out), expected, rtol=0, atol=1e-5)


def test_an_adapter_for_other_shapes_is_refused(base: Path, adapter: Path, out: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    save_file(tensors | {key: torch.zeros(23, 3)}, adapter / "adapter_model.safetensors")
    refused(base, adapter, out, r"B \(23, 3\) for 'model\.layers\.0\.mlp\.up_proj', whose weight is \(22, 12\)")


def test_an_adapter_with_nan_is_refused(base: Path, adapter: Path, out: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(base, adapter, out, "NaN or infinity in 'model.layers.0.mlp.up_proj'")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model-00001-of-*.safetensors"])
def test_a_truncated_file_is_refused(base: Path, adapter: Path, out: Path, name: str) -> None:
    file = next(path for folder in (base, adapter) for path in folder.glob(name))
    file.write_bytes(file.read_bytes()[:-5])
    refused(base, adapter, out, "is not a whole safetensors file")


def test_a_missing_shard_is_refused(base: Path, adapter: Path, out: Path) -> None:
    next(base.glob("model-00002-*")).unlink()
    refused(base, adapter, out, r"model-00002-of-\d+\.safetensors does not exist; .* is incomplete")


def test_an_index_that_names_an_absent_tensor_is_refused(base: Path, adapter: Path, out: Path) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(base, adapter, out, "names 'ghost'")


def test_a_quantized_base_is_refused(base: Path, adapter: Path, out: Path) -> None:
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(base, adapter, out, "is quantized; merge into the original")


def test_a_base_that_is_a_pickle_is_refused(base: Path, adapter: Path, out: Path) -> None:
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    refused(base, adapter, out, "has neither")
    (base / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refused(base, adapter, out, "a pickle, which is not read")


def test_a_dtype_that_is_no_float_is_refused(base: Path, adapter: Path, out: Path) -> None:
    refused(base, adapter, out, r"torch\.int8 was given", dtype=torch.int8)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_file_that_cannot_be_written_is_one_sentence(base: Path, adapter: Path, out: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(LoryError, match=r"Could not merge .*File too large"):
            merge_shards(base, adapter, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_says_what_to_do(base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise merge.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(merge, "save_file", fail)
    with pytest.raises(LoryError, match="the disk is full; free some space"):
        merge_shards(base, adapter, out)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("2GiB", 2 * 1024**3),
        ("1.5 kb", 1_500),
        ("1TB", 10**12),
        (" 3g ", 3_000_000_000),
        ("4096", 4096),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "0.1B", "5XB", "5 G B", "1e9", "5iB", "٣GB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="was given as a size"):
        parse_size(text)
