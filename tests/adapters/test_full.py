"""full and freeze: what is trained, the gradients, and checkpoints that are models."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lory.adapters.full import FreezeConfig, FullConfig, attach, load_weights, save
from lory.config import build
from lory.data.mixture.collate import collate
from lory.models.load import load_model
from lory.models.resolve import resolve
from lory.runtime import UsageError
from lory.training.checkpoint import _load_optimizer, _optimizer_tensors
from lory.training.masters import MasterAdamW
from lory.training.step import Objective, attention_for, train_step
from lory.types import IGNORE, Sample

Load = Callable[..., Any]
FULL = FullConfig()
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "qwen2-vl": "model.language_model.layers"}


def make_samples(seed: int, lengths: Iterable[int] = (9, 5, 12), vocabulary: int = 61) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        samples.append(Sample(tuple(ids), (IGNORE,) * 2 + tuple(ids[2:])))
    return samples


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    objective = Objective(model).train()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    accelerator = Accelerator(cpu=True)
    batches = [[collate(make_samples(step))] for step in steps]
    return [train_step(objective, batch, optimizer, schedule, accelerator, 1.0).loss for batch in batches]


def make_optimizer(model: Any, rate: float = 1e-2) -> MasterAdamW:
    return MasterAdamW([{"params": [p for p in model.parameters() if p.requires_grad]}], rate)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 13)[None], use_cache=False).logits


def equal_state(model: Any, other: Any) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine
    )


# What is trained


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "qwen2-vl"])
def test_full_trains_every_parameter(load_random: Load, name: str) -> None:
    model = load_random(name)
    matches = attach(model, FULL)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert sum(match.parameters for match in matches) == sum(p.numel() for p in model.parameters())
    assert len({match.name for match in matches}) == len(matches)


@pytest.mark.parametrize("name", LAYERS)
def test_the_last_layers_are_the_decoders(load_random: Load, name: str) -> None:
    model = load_random(name)
    matches = attach(model, FreezeConfig(last_layers=1))
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith(f"{LAYERS[name]}.1.")}
    assert all(match.name.startswith(f"{LAYERS[name]}.1.") for match in matches)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bloom"])
def test_biases_trains_all_biases_and_nothing_else(load_random: Load, name: str) -> None:
    model = load_random(name)
    matches = attach(model, FreezeConfig(trainable="biases"))
    assert trained(model) == {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert all(match.kind.endswith(" (bias)") for match in matches)
    assert sum(match.parameters for match in matches) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_an_expression_matches_whole_names(load_random: Load) -> None:
    model = load_random("llama")
    attach(model, FreezeConfig(trainable=r".*layers\.0\..*norm\.weight"))
    assert trained(model) == {f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")}


def test_last_layers_and_an_expression_add_up(load_random: Load) -> None:
    model = load_random("llama")
    attach(model, FreezeConfig(last_layers=1, trainable=r"model\.norm\.weight"))
    assert "model.norm.weight" in trained(model)
    assert "model.layers.1.mlp.up_proj.weight" in trained(model)
    assert "model.layers.0.mlp.up_proj.weight" not in trained(model)


def test_a_tied_head_trains_the_embeddings_and_says_so(load_random: Load, caplog: pytest.LogCaptureFixture) -> None:
    model = load_random("gemma2")
    with caplog.at_level(logging.INFO, logger="lory"):
        matches = attach(model, FreezeConfig(trainable=r"lm_head\.weight"))
    assert trained(model) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight.requires_grad
    assert len(matches) == 1
    assert "'lm_head.weight' and 'model.embed_tokens.weight' are the same (tied)" in caplog.text


def test_attaching_again_forgets_what_was_trained_before(load_random: Load) -> None:
    model = load_random("llama")
    attach(model, FULL)
    attach(model, FreezeConfig(trainable=r"model\.norm\.weight"))
    assert trained(model) == {"model.norm.weight"}


# What cannot be trained


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("llama", FreezeConfig(last_layers=3), "last_layers is 3, and LlamaForCausalLM has 2 layers"),
        ("llama", FreezeConfig(trainable="biases"), "the model has no biases. There are: model.embed_tokens.weight"),
        ("llama", FreezeConfig(trainable="q_proj"), r"model\.layers\.\*\.self_attn\.q_proj\.weight \(2\)"),
    ],
)
def test_nothing_to_train_is_an_error_that_says_what_there_is(
    load_random: Load, name: str, config: FreezeConfig, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        attach(load_random(name), config)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "freeze needs last_layers or trainable"),
        ({"trainable": "("}, "'trainable' was given '\\(': a regular expression is expected"),
        ({"last_layers": 0}, "'last_layers' was given 0"),
    ],
)
def test_a_config_that_says_too_little_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        build(FreezeConfig, values, "config")


def test_quantized_weights_are_refused(load_random: Load) -> None:
    model = load_random("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), False)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj\.weight' is quantized \(torch\.uint8\)"):
        attach(model, FULL)


def test_float16_is_warned_about(load_random: Load, caplog: pytest.LogCaptureFixture) -> None:
    attach(load_random("llama").half(), FULL)
    assert "small gradients vanish" in caplog.text


# Gradients


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_are_those_of_transformers_own_loss(load_random: Load, name: str, packed: bool) -> None:
    if packed and name == "bloom":
        pytest.skip("position biases cannot keep documents apart")
    model, reference = load_random(name).double(), load_random(name).double()
    attach(model, FULL)
    samples = make_samples(0)
    batch = collate(samples, padded=not packed)
    objective = Objective(model)
    with attention_for(model, batch):
        objective(batch).loss.backward()
    for sample in samples:
        output = reference(torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels]), use_cache=False)
        (output.loss * sample.supervised).backward()
    for (path, own), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        # norms compute in fp32 whatever the model is
        assert (own.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max(), path


def test_tied_embeddings_get_the_sum_of_both_paths(random_model: Load) -> None:
    tied = random_model("Llama", tie_word_embeddings=True).double()
    apart = random_model("Llama", tie_word_embeddings=False).double()
    apart.load_state_dict(tied.state_dict())
    batch = collate(make_samples(0), padded=True)
    for model in (tied, apart):
        attach(model, FULL)
        Objective(model)(batch).loss.backward()
    head, embeddings = apart.lm_head.weight.grad, apart.model.embed_tokens.weight.grad
    assert head.abs().max() > 0
    assert embeddings.abs().max() > 0
    torch.testing.assert_close(tied.model.embed_tokens.weight.grad, head + embeddings, rtol=1e-10, atol=1e-12)


def test_a_head_alone_can_be_trained(load_random: Load) -> None:
    model = load_random("llama")
    attach(model, FreezeConfig(trainable=r"lm_head\.weight"))
    Objective(model)(collate(make_samples(0))).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")


@pytest.mark.parametrize("config", [FreezeConfig(last_layers=1), FreezeConfig(trainable="biases")])
def test_frozen_parameters_stay_bit_for_bit(load_random: Load, config: FreezeConfig) -> None:
    model, before = load_random("qwen2"), load_random("qwen2")
    attach(model, config)
    losses = train(model, make_optimizer(model), range(1)) + train(model, make_optimizer(model), range(1))
    assert losses[1] < losses[0]
    for (name, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, then) != now.requires_grad, name


# Checkpoints


def test_a_checkpoint_is_a_model_of_the_architecture(load_random: Load, architecture_name: str, tmp_path: Path) -> None:
    model = load_random(architecture_name)
    save(model, tmp_path, "somewhere")
    assert equal_state(load_random(architecture_name, tmp_path), model)
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs)
    assert stored_names(tmp_path) == stored_names(theirs)
    for path in theirs.glob("*.json"):
        assert (tmp_path / path.name).read_text() == path.read_text()


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            assert not names & set(file.keys())
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_transformers_and_lory_load_a_trained_model_with_equal_logits(
    load_random: Load, name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = load_random(name)
    before = logits(model)
    attach(model, FULL)
    train(model, make_optimizer(model), range(2))
    save(model, tmp_path, "")
    expected = logits(model)
    assert not torch.equal(expected, before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    resolved = resolve(tmp_path)
    assert resolved.adapter is None
    assert torch.equal(logits(load_model(resolved, device=torch.device("cpu"))), expected)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "qwen2-vl"])
def test_shards_are_small_cover_all_and_never_cut_a_layer(load_random: Load, name: str, tmp_path: Path) -> None:
    model = load_random(name)
    save(model, tmp_path, "", max_shard_bytes=1)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    of_layer: dict[str, set[str]] = {}
    for file, names in ((path.name, load_file(path)) for path in files):
        for key in names:
            if ".layers." in key:
                of_layer.setdefault(key.split(".layers.")[1].split(".")[0], set()).add(file)
    assert all(len(places) == 1 for places in of_layer.values())
    fresh = load_random(name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_weights(fresh, tmp_path)
    assert equal_state(fresh, model)


@pytest.mark.parametrize("shards", [1, 5_000_000_000])
def test_the_index_names_the_weights_and_no_other_file(load_random: Load, shards: int, tmp_path: Path) -> None:
    # vLLM and SGLang take every .safetensors for weights that no index rules out
    model = load_random("llama")
    save(model, tmp_path, "", max_shard_bytes=shards)
    save_file({"0.exp_avg": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert equal_state(load_random("llama", tmp_path), model)


def test_tied_weights_are_written_once(load_random: Load, tmp_path: Path) -> None:
    save(load_random("gemma2"), tmp_path, "")
    names = stored_names(tmp_path)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_files_can_be_read_by_whom_the_config_can(load_random: Load, tmp_path: Path) -> None:
    save(load_random("llama"), tmp_path, "")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("llama", "gemma2", "gpt2") for dtype in (torch.float32, torch.bfloat16)]
    # torch's grouped products of bf16 want larger experts
    + [("mixtral", torch.float32)],
)
@pytest.mark.parametrize("config", [FULL, FreezeConfig(last_layers=1, trainable=r".*norm\.weight|.*ln_f\..*")])
def test_resumed_is_uninterrupted_bit_for_bit(
    load_random: Load, name: str, dtype: torch.dtype, config: FullConfig | FreezeConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = load_random(name).to(dtype)
    attach(whole, config)
    optimizer = make_optimizer(whole)
    train(whole, optimizer, range(2))
    save(whole, tmp_path, "")
    save_file(_optimizer_tensors(optimizer), tmp_path / "optimizer.safetensors")
    generator = torch.get_rng_state()
    losses = train(whole, optimizer, range(2, 5))

    resumed = load_random(name).to(dtype)
    attach(resumed, config)
    fresh = make_optimizer(resumed)
    parameters = list(resumed.parameters())
    load_weights(resumed, tmp_path)
    assert all(a is b for a, b in zip(parameters, resumed.parameters(), strict=True))
    _load_optimizer(load_file(tmp_path / "optimizer.safetensors"), fresh)
    torch.set_rng_state(generator)
    assert train(resumed, fresh, range(2, 5)) == losses
    assert equal_state(whole, resumed)


def test_weights_of_mixed_precision_come_back_bit_for_bit(load_random: Load, tmp_path: Path) -> None:
    model, fresh = load_random("llama"), load_random("llama")
    for each in (model, fresh):
        each.bfloat16().model.norm.float()
    with torch.no_grad():
        model.model.norm.weight.add_(1e-6)
    save(model, tmp_path, "")
    load_weights(fresh, tmp_path)
    assert equal_state(fresh, model)


def test_weights_of_another_model_are_refused(load_random: Load, random_model: Load, tmp_path: Path) -> None:
    save(load_random("llama"), tmp_path, "")
    with pytest.raises(UsageError, match="disagree on"):
        load_weights(load_random("gpt2"), tmp_path)
    with pytest.raises(UsageError, match=r"has no 'model\.embed_tokens\.weight' of shape \(131, 24\)"):
        load_weights(random_model("Llama"), tmp_path)
    with pytest.raises(UsageError, match="could not be loaded"):
        load_weights(load_random("llama"), tmp_path / "nowhere")


def test_a_model_tied_in_another_way_is_refused(random_model: Load, tmp_path: Path) -> None:
    save(random_model("Llama", tie_word_embeddings=False), tmp_path, "")
    with pytest.raises(UsageError, match="ties other weights"):
        load_weights(random_model("Llama", tie_word_embeddings=True), tmp_path)


def test_a_lost_weight_is_noticed(load_random: Load, tmp_path: Path) -> None:
    save(load_random("llama"), tmp_path, "")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"disagree on 1 weights, model\.norm\.weight among them"):
        load_weights(load_random("llama"), tmp_path)
