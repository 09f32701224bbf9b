"""Bases in 4 and 8 bits: what is quantized, that LoRA on them learns what it should, and what is refused."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import lory.lora as lora
from lory.adapters.files import load_adapter, save_adapter
from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora
from lory.models.quantize import (
    count_bits,
    count_bytes,
    prepare_for_training,
    quantized_arguments,
    stored_quantization,
)
from lory.runtime import UsageError

bnb = pytest.importorskip("bitsandbytes")

KINDS = ["nf4", "int8"]
CPU = torch.device("cpu")
# multiples of 64, since bitsandbytes repacks only such layers in eval mode
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 320}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose head is tied to its embeddings."""
    path = tmp_path_factory.mktemp("wide-llama")
    random_model("Llama", **WIDE, tie_word_embeddings=True).save_pretrained(path)
    return path


def load(folder: Path, quantize: Any, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = quantized_arguments(AutoConfig.from_pretrained(folder), quantize, dtype, CPU)
    return prepare_for_training(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **arguments)).eval()


def dequantize(model: Any, folder: Path) -> Any:
    """The plain model with the numbers of the quantized one."""
    plain = load(folder, None)
    for path, module in model.named_modules():
        if lora.is_quantized(module):
            numbers = lora.adapt_quantized(module, r=0, lora_alpha=1).base_weight()
            plain.get_submodule(path).weight = nn.Parameter(numbers.float())
    return plain


def adapt(model: Any, **settings: Any) -> Any:
    attach_lora(model, AdapterConfig(rank=3, alpha=6, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_A.normal_(std=0.1, generator=generator)
            layer.lora_B.normal_(std=0.1, generator=generator)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    ids = torch.arange(60).view(2, 30) % 40
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        error = float((value - other[name]).norm() / other[name].norm())
        assert error < 1e-5, f"{name}: {error}"


def evaluate(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.arange(1, 12)[None], use_cache=False).logits
    return logits


def test_linear_layers_are_quantized_and_nothing_else(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    few = {path for path, module in model.named_modules() if lora.is_quantized(module)}
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert few == linear - {"lm_head"}
    assert len(few) == 14
    assert model.lm_head.weight is model.get_input_embeddings().weight
    rest = [p for path, module in model.named_modules() if path not in few for p in module.parameters(recurse=False)]
    assert {p.dtype for p in rest} == {torch.float32}


@pytest.mark.parametrize("quantize", ["nf4", "nf4-pure"])
def test_nf4_is_doubly_quantized(folder: Path, quantize: str) -> None:
    state = load(folder, quantize).model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)


def test_nf4_is_for_the_widening_layers_and_pure_nf4_for_all(folder: Path) -> None:
    kinds = {path: type(module) for path, module in load(folder, "nf4").named_modules() if lora.is_quantized(module)}
    int8 = {path for path, kind in kinds.items() if kind is bnb.nn.Linear8bitLt}
    assert {path.rpartition(".")[2] for path in kinds.keys() - int8} == {"gate_proj", "up_proj"}
    assert {kind for path, kind in kinds.items() if path not in int8} == {bnb.nn.Linear4bit}
    pure = [module for module in load(folder, "nf4-pure").modules() if lora.is_quantized(module)]
    assert {type(module) for module in pure} == {bnb.nn.Linear4bit}


def test_nf4_rounds_less_than_pure_nf4(folder: Path) -> None:
    exact = evaluate(load(folder, None))
    mixed, pure, int8 = ((evaluate(load(folder, kind)) - exact).norm() for kind in ("nf4", "nf4-pure", "int8"))
    assert int8 < mixed < 0.9 * pure


def test_nf4_is_clipped_where_that_rounds_better(folder: Path) -> None:
    from lory.models.mixed_bits import clip_blocks

    def errors(quantize: str) -> Tensor:
        layer = load(folder, quantize).model.layers[0].mlp.up_proj
        numbers = lora.adapt_quantized(layer, r=0, lora_alpha=1).base_weight()
        return (numbers - exact).view(-1, 64).norm(dim=1)

    exact = load(folder, None).model.layers[0].mlp.up_proj.weight.detach()
    clipped, pure = errors("nf4"), errors("nf4-pure")
    assert clipped.norm() < 0.96 * pure.norm()
    assert (clipped < 1.1 * pure).all()  # the scales are rounded, too
    odd = torch.randn(3, 7)
    assert clip_blocks(odd) is odd


def test_the_layers_that_gpt2_stores_transposed_are_told_apart_by_what_they_do(
    random_model: Callable[..., Any], tmp_path: Path
) -> None:
    random_model("GPT2", n_embd=64, n_head=4, n_layer=1).save_pretrained(tmp_path)
    model, plain = load(tmp_path, "nf4"), load(tmp_path, None)
    block = model.transformer.h[0]
    assert type(block.mlp.c_proj) is type(block.attn.c_proj) is bnb.nn.Linear8bitLt
    assert type(block.mlp.c_fc) is type(block.attn.c_attn) is bnb.nn.Linear4bit
    for name, tolerance in (("c_proj", 0.01), ("c_fc", 0.15)):
        weight = lora.adapt_quantized(block.mlp.get_submodule(name), r=0, lora_alpha=1).base_weight()
        exact = plain.transformer.h[0].mlp.get_submodule(name).weight.T
        assert (weight - exact).norm() < tolerance * exact.norm()


def test_a_mixed_model_is_not_saved_as_something_else(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        load(folder, "nf4").save_pretrained(tmp_path)


def test_the_bits_a_weight_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lory"):
        bits = [count_bits(load(folder, quantize)) for quantize in ("nf4-pure", "nf4", "int8")]
    assert bits == sorted(bits)
    assert bits[0] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert caplog.messages[0] == "14 linear layers take 4.13 bits a weight in place of 32."


def test_an_untied_head_is_not_quantized(tiny_model: Path, kind: str) -> None:
    model = load(tiny_model, kind)
    assert type(model.lm_head) is nn.Linear
    assert lora.is_quantized(model.model.layers[1].self_attn.q_proj)


def test_without_quantization_nothing_is_asked_of_transformers(folder: Path) -> None:
    model = load(folder, None)
    assert not any(lora.is_quantized(module) for module in model.modules())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_gradients_are_those_over_the_dequantized_weights_before_and_after_an_evaluation(
    folder: Path, kind: str, targets: Any
) -> None:
    model = load(folder, kind)
    evaluate(model)  # as checks of a model before its training do
    expected = gradients(adapt(dequantize(model, folder), targets=targets))
    adapt(model, targets=targets)
    assert_same(gradients(model), expected)
    evaluate(model)
    assert_same(gradients(model), expected)


def test_a_run_over_few_bits_is_a_run_over_their_numbers(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    losses = []
    for each in (dequantize(model, folder), model):
        adapt(each)
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for number in range(15):
            losses[-1].append(step(each, optimizer, (torch.arange(40) * 7 % (20 + number))[None]))
            evaluate(each)
    plain, quantized = losses
    assert quantized == pytest.approx(plain, rel=1e-4)
    assert quantized[-1] < 0.8 * quantized[0]


def test_evaluation_computes_what_was_trained(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    expected = evaluate(dequantize(model, folder))
    torch.testing.assert_close(evaluate(model), expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(folder: Path, kind: str) -> None:
    model = adapt(load(folder, kind))
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("settings", [{"type": "dora"}, {"init": "pissa"}, {"rslora": True, "dropout": 0.1}])
def test_all_kinds_of_lora_train_on_quantized_bases(folder: Path, kind: str, settings: dict[str, Any]) -> None:
    model = load(folder, kind)
    attach_lora(model, AdapterConfig(rank=3, alpha=6, **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [step(model, optimizer, (torch.arange(40) % 20)[None]) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_table_of_matches_shows_the_layers_own_shapes(folder: Path, kind: str) -> None:
    matches = {m.name: m for m in attach_lora(load(folder, kind), AdapterConfig(rank=3))}
    match = matches["model.layers.0.mlp.up_proj"]
    assert (match.shape, match.rank, match.parameters) == ((128, 64), 3, 3 * (128 + 64))


def test_only_the_adapter_is_saved_and_it_loads_on_quantized_and_plain_bases(
    folder: Path, kind: str, tmp_path: Path
) -> None:
    model = adapt(load(folder, kind))
    save_adapter(model, tmp_path, str(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in file.keys())  # noqa: SIM118
        assert len(list(file.keys())) == 28
    again = load(folder, kind)
    load_adapter(again, tmp_path)
    assert torch.equal(evaluate(again), evaluate(model))
    plain = dequantize(load(folder, kind), folder)
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(evaluate(plain), evaluate(model), rtol=1e-4, atol=1e-4)


def test_peft_reads_the_adapter_over_the_same_quantized_base(folder: Path, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapt(load(folder, kind))
    save_adapter(model, tmp_path, str(folder))
    theirs = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path)
    torch.testing.assert_close(evaluate(theirs), evaluate(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4-pure", "int8"])
def test_a_folder_that_is_quantized_already_is_loaded_as_it_is(folder: Path, kind: str, tmp_path: Path) -> None:
    model = load(folder, kind)
    model.save_pretrained(tmp_path)
    for asked in (None, kind, *(["nf4"] if kind == "nf4-pure" else [])):
        again = load(tmp_path, asked)
        assert lora.is_quantized(again.model.layers[0].mlp.up_proj)
        assert torch.equal(evaluate(again), evaluate(model))
    expected = gradients(adapt(dequantize(model, folder)))
    assert_same(gradients(adapt(again)), expected)
    other = "int8" if kind == "nf4-pure" else "nf4"
    with pytest.raises(UsageError, match=rf"model.quantize is {other}, .* quantized as {kind} already"):
        load(tmp_path, other)


def test_another_method_than_bitsandbytes_is_not_quantized_again(folder: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    assert stored_quantization(config) is None
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert stored_quantization(config) == "gptq"
    assert quantized_arguments(config, None, torch.float32, CPU) == {}
    with pytest.raises(UsageError, match="quantized as gptq already"):
        quantized_arguments(config, "nf4", torch.float32, CPU)


def test_without_bitsandbytes_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"bitsandbytes, which is not installed: run pip install 'lory-llm\[quantize\]'"
    ):
        quantized_arguments(AutoConfig.from_pretrained(folder), "nf4", torch.float32, CPU)


def test_modules_in_few_bits_are_not_trained_in_full(folder: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="up_proj' is quantized, so it cannot be trained in full"):
        attach_lora(load(folder, kind), AdapterConfig(targets=["q_proj"], modules_to_save=["up_proj"]))


def test_bitsandbytes_is_quiet(folder: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapt(load(folder, kind, torch.bfloat16), targets=["q_proj"])
    gradients(model)
    evaluate(model)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_most_of_which_cannot_be_quantized_is_told(
    random_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random_model("Mixtral", num_local_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path)
    load(tmp_path, "nf4")
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "of the weights could be quantized; the rest, such as experts" in message


@pytest.mark.parametrize("quantize", [None, "nf4-pure", *KINDS])
def test_the_bytes_counted_are_the_bytes_taken(folder: Path, quantize: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model = load(folder, quantize)
    taken = 0
    for parameter in model.parameters():
        taken += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            taken += state.absmax.numel() + 4 * state.state2.absmax.numel()
        if (scales := getattr(parameter, "SCB", None)) is not None:
            taken += 4 * scales.numel()
    assert count_bytes(shape, torch.float32, quantize) == pytest.approx(taken, rel=2e-3)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """One update; returns the loss before it."""
    model.train()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.slow
def test_smollm2_learns_as_in_fp32(tmp_path: Path) -> None:
    from benchmarks.quantized import run

    results = run(["fp32", *KINDS], steps=15, folder=tmp_path)["kinds"]
    plain = results.pop("fp32")
    for result in results.values():
        assert result["after_ratio"] < 1.03
        assert result["before"] - result["after"] > 0.9 * (plain["before"] - plain["after"])
