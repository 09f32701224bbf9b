"""Soft prompts go both ways between lory and PEFT with equal logits, and train, pack, resume and generate."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lory.adapters.encoders import PromptConfig, find_soft_prompt
from lory.adapters.prefix import prefix_arguments
from lory.adapters.prompt import (
    attach,
    load,
    load_weights,
    prompt_inputs,
    save,
    virtual_length,
)
from lory.adapters.virtual_tokens import Leading, find_leading, virtual_ids
from lory.data.mixture.collate import Batch, collate
from lory.models.attention import documents_apart, keeps_documents_apart
from lory.runtime import UsageError, read_json
from lory.training.step import Objective
from lory.types import IGNORE, Sample

Load = Callable[[str], Any]
TOKENS = 3
IDS = torch.tensor([[1, 5, 9, 30, 2, 7]])

VARIANTS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "prompt", "init": "random"},
    "mlp": {"type": "ptuning", "encoder_hidden_size": 10},
    "lstm": {"type": "ptuning", "encoder": "lstm", "encoder_hidden_size": 7, "encoder_layers": 3},
    "prefix": {"type": "prefix"},
    "projection": {"type": "prefix", "projection": True, "encoder_hidden_size": 11},
}
# What keeps keys and values alike in all layers
CACHED = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "glm4", "falcon", "bloom", "bert", "roberta", "qwen2-vl")
UNCACHED = ("deberta-v2", "rwkv")
# PEFT finds no number of heads, or a wrong one
HEADS: dict[str, dict[str, Any]] = {
    "rwkv": {"num_attention_heads": 1},
    "falcon": {"num_attention_heads": 1, "token_dim": 4},
}
CASES = [(name, variant) for name in (*CACHED, *UNCACHED) for variant in VARIANTS]
CASES = [(name, variant) for name, variant in CASES if name in CACHED or VARIANTS[variant]["type"] != "prefix"]
GENERATING = [case for case in CASES if case[0] not in ("bert", "roberta", "deberta-v2")]
each_case = pytest.mark.parametrize(("name", "variant"), CASES)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and torch's of what is meant
        yield


def config_of(variant: str, **changes: Any) -> PromptConfig:
    return PromptConfig(**({"virtual_tokens": TOKENS} | VARIANTS[variant] | changes))


def peft_config(name: str, variant: str, model: nn.Module) -> Any:
    own = config_of(variant)
    common: dict[str, Any] = {
        "num_virtual_tokens": TOKENS,
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION",
    }
    if own.type == "prefix" or name == "rwkv":
        common |= HEADS.get(name, {})
    if own.type == "prompt":
        return peft.PromptTuningConfig(**common)
    common["encoder_hidden_size"] = own.encoder_hidden_size
    if own.type == "prefix":
        return peft.PrefixTuningConfig(prefix_projection=own.projection, **common)
    kind = own.encoder.upper()
    return peft.PromptEncoderConfig(
        encoder_reparameterization_type=kind, encoder_num_layers=own.encoder_layers, **common
    )


def with_prompt(load_random: Load, name: str, variant: str, **changes: Any) -> Any:
    """A model with a random soft prompt, in eval mode."""
    model = load_random(name)
    torch.manual_seed(1)
    attach(model, config_of(variant, **changes))
    return model


def forward(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits after the model's soft prompt, those of virtual tokens included, as PEFT has them."""
    mask = torch.ones_like(ids) if mask is None else mask
    before = torch.tensor(virtual_ids(model), dtype=torch.long).expand(len(ids), -1)
    mask_before = torch.ones_like(before)
    arguments = {"attention_mask": torch.cat([mask_before, mask], 1)} | prefix_arguments(model, mask)
    return model(input_ids=torch.cat([before, ids], 1), use_cache=False, **arguments).logits


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    return forward(model, ids, mask)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@each_case
def test_what_lory_saves_peft_answers_alike(name: str, variant: str, load_random: Load, tmp_path: Path) -> None:
    model = with_prompt(load_random, name, variant)
    expected = logits(model)
    with torch.no_grad():
        plain = load_random(name)(input_ids=IDS).logits
    assert (expected[:, -6:] - plain).abs().max() > 0.05
    save(model, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(load_random(name), tmp_path).eval()
    with torch.no_grad():
        assert_equal(theirs(input_ids=IDS).logits, expected)
    again = load_random(name)
    load(again, tmp_path)
    assert torch.equal(logits(again), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())


@each_case
def test_what_peft_saves_lory_answers_alike(name: str, variant: str, load_random: Load, tmp_path: Path) -> None:
    base = load_random(name)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(base, peft_config(name, variant, base)).eval()
    theirs.save_pretrained(tmp_path)
    model = load_random(name)
    load(model, tmp_path)
    with torch.no_grad():
        assert_equal(logits(model), theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_write_the_same_config(variant: str, load_random: Load, tmp_path: Path) -> None:
    base = load_random("llama")
    peft.get_peft_model(base, peft_config("llama", variant, base)).save_pretrained(tmp_path / "peft")
    (tmp_path / "lory").mkdir()
    save(with_prompt(load_random, "llama", variant), tmp_path / "lory", base.name_or_path)
    theirs = read_json(tmp_path / "peft" / "adapter_config.json")
    ours = read_json(tmp_path / "lory" / "adapter_config.json")
    assert ours == {key: value for key, value in theirs.items() if key in ours}
    left_out = theirs.keys() - ours.keys()
    assert all(theirs[key] is None for key in left_out - {"peft_version"})
    shapes = [
        {key: value.shape for key, value in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("lory", "peft")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom"])
def test_padded_rows_are_answered_as_alone_and_as_peft_does(
    name: str, variant: str, load_random: Load, tmp_path: Path
) -> None:
    model = with_prompt(load_random, name, variant)
    ids = torch.tensor([[1, 5, 9, 30, 2, 7], [4, 8, 11, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    found = logits(model, ids, mask)
    assert_equal(found[:1], logits(model, ids[:1]))
    own = len(virtual_ids(model))
    assert_equal(found[1:, : own + 3], logits(model, ids[1:, :3]))
    save(model, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(load_random(name), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits
    assert_equal(found[:, : own + 3], expected[:, : own + 3])


@pytest.mark.parametrize(("name", "variant"), GENERATING)
def test_greedy_answers_are_pefts_token_for_token(name: str, variant: str, load_random: Load, tmp_path: Path) -> None:
    model = with_prompt(load_random, name, variant)
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**prompt_inputs(model, IDS[:, :4]), **how)
    assert torch.equal(found[:, :4], IDS[:, :4])
    assert found.shape == (1, 12)
    # they are what a forward over the whole would have chosen
    chosen = logits(model, found[:, :-1])[:, -8:].argmax(-1)
    assert torch.equal(found[:, 4:], chosen)
    if name == "rwkv":
        return  # PEFT puts the prompt in again at each step of a model without a cache
    save(model, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(load_random(name), tmp_path).eval()
    expected = theirs.generate(input_ids=IDS[:, :4], attention_mask=torch.ones(1, 4, dtype=torch.long), **how)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("variant", ["mlp", "prefix"])
def test_rows_padded_on_the_left_are_continued_as_alone(variant: str, load_random: Load) -> None:
    model = with_prompt(load_random, "llama", variant)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([[1, 5, 9, 30], [0, 0, 11, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    both = model.generate(**prompt_inputs(model, ids, mask), **how)
    assert torch.equal(both[:1], model.generate(**prompt_inputs(model, ids[:1]), **how))
    assert torch.equal(both[1:, 2:], model.generate(**prompt_inputs(model, ids[1:, 2:]), **how))


@pytest.mark.parametrize("variant", VARIANTS)
def test_repetition_is_counted_over_real_tokens_alone(variant: str, load_random: Load) -> None:
    model = with_prompt(load_random, "llama", variant)
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = IDS
    for _ in range(6):
        scores = logits(model, ids)[:, -1]
        for token in set(ids[0].tolist()):
            scores[0, token] = scores[0, token] * 3 if scores[0, token] < 0 else scores[0, token] / 3
        ids = torch.cat([ids, scores.argmax(-1)[None]], 1)
    found = model.generate(**prompt_inputs(model, IDS), max_new_tokens=6, repetition_penalty=3.0, **how)
    assert torch.equal(found, ids)


def test_a_model_without_a_prompt_is_given_its_tokens_as_they_are(load_random: Load) -> None:
    model = load_random("llama")
    inputs = prompt_inputs(model, IDS)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert (virtual_ids(model), virtual_length(model)) == ((), 0)
    sample = Sample((1, 2), (IGNORE, 2))
    assert find_leading(model, packed=True) == Leading()
    assert Leading().prepend(sample) is sample


SAMPLES = [
    Sample((1, 5, 9, 30, 2), (IGNORE, IGNORE, 9, 30, 2)),
    Sample((4, 8), (4, 8)),
    Sample((3, 3, 17, 20, 6, 6, 41), (IGNORE, IGNORE, IGNORE, 20, 6, 6, 41)),
]


def batch_of(model: Any, samples: list[Sample], padded: bool) -> Batch:
    return collate([find_leading(model, not padded).prepend(sample) for sample in samples], padded)


def gradients(model: Any, objective: nn.Module, batches: list[Batch]) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    total = sum(objective(batch).loss for batch in batches)
    total.backward()
    return total.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "glm4"])
def test_packed_rows_teach_what_single_and_padded_ones_do(name: str, variant: str, load_random: Load) -> None:
    model = with_prompt(load_random, name, variant)
    assert keeps_documents_apart(model)
    objective = Objective(model)
    with documents_apart(model):
        packed = gradients(model, objective, [batch_of(model, SAMPLES, padded=False)])
    alone = gradients(model, objective, [batch_of(model, [sample], padded=True) for sample in SAMPLES])
    padded = gradients(model, objective, [batch_of(model, SAMPLES, padded=True)])
    assert packed[1]
    for loss, found in (packed, padded):
        assert loss == pytest.approx(alone[0], rel=1e-5)
        for gradient, expected in zip(found, alone[1], strict=True):
            assert (gradient - expected).abs().max() <= 1e-5 * max(float(expected.abs().max()), 1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_loss_and_gradients_are_pefts(name: str, variant: str, load_random: Load) -> None:
    model = with_prompt(load_random, name, variant)
    base = load_random(name)
    theirs = peft.get_peft_model(base, peft_config(name, variant, base)).eval()
    encoder = theirs.prompt_encoder["default"]
    encoder.load_state_dict(find_soft_prompt(model).state_dict())
    ids = torch.tensor([[1, 5, 9, 30, 2, 7], [4, 8, 11, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    labels = ids.masked_fill(mask == 0, IGNORE)
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    own = len(virtual_ids(model))
    found = forward(model, ids, mask)
    labels = torch.cat([torch.full((2, own), IGNORE), labels], 1)
    loss = nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, other in zip(find_soft_prompt(model).parameters(), encoder.parameters(), strict=True):
        assert (parameter.grad - other.grad).abs().max() <= 1e-4 * max(float(other.grad.abs().max()), 1e-3)


def take_steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        ids = torch.tensor([[1, 5, 9, 30, 2, 7]])
        found = forward(model, ids)[:, -6:]
        loss = nn.functional.cross_entropy(found[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def learning(model: Any, rate: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_prompt_learns_and_the_model_stays(name: str, variant: str, load_random: Load) -> None:
    model = with_prompt(load_random, name, variant)
    before = load_random(name).state_dict()
    losses = take_steps(model, learning(model, 0.02), 40)
    # dropout makes single losses differ
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    after = model.state_dict()
    # the model's own keys are as they were, and the prompt's come on top
    assert after.keys() > before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    learnt = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert learnt == after.keys() - before.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(variant: str, load_random: Load, tmp_path: Path) -> None:
    whole = with_prompt(load_random, "llama", variant)
    expected = take_steps(whole, learning(whole), 6)

    first = with_prompt(load_random, "llama", variant)
    optimizer = learning(first)
    losses = take_steps(first, optimizer, 3)
    save(first, tmp_path, "base")
    for second in (with_prompt(load_random, "llama", variant), load_random("llama")):
        if find_soft_prompt(second):
            load_weights(second, tmp_path)
        else:
            load(second, tmp_path, trainable=True)
        resumed = learning(second)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert losses + take_steps(second, resumed, 3) == expected
        for found, wanted in zip(second.parameters(), whole.parameters(), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("variant", ["mlp", "prefix"])
def test_checkpointed_layers_give_the_same_gradients(variant: str, load_random: Load) -> None:
    model = with_prompt(load_random, "llama", variant).train()
    objective = Objective(model)
    batch = [batch_of(model, SAMPLES, padded=False)]
    with documents_apart(model):
        _, expected = gradients(model, objective, batch)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _, found = gradients(model, objective, batch)
    assert any(gradient.any() for gradient in found)
    for gradient, wanted in zip(found, expected, strict=True):
        # layers that are not checkpointed are computed by another path
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_a_prefix_of_padded_rows_refuses_checkpointed_layers(load_random: Load) -> None:
    model = with_prompt(load_random, "llama", "prefix").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient_checkpointing"):
        forward(model, IDS)


@pytest.mark.parametrize("name", UNCACHED)
def test_a_prefix_refuses_models_that_would_not_look_at_it(name: str, load_random: Load) -> None:
    with pytest.raises(UsageError, match="does not keep keys and values alike"):
        attach(load_random(name), config_of("prefix"))


def test_windows_of_attention_reach_into_the_prefix_as_in_peft(load_random: Load, tmp_path: Path) -> None:
    import transformers

    config = load_random("gemma2").config
    config.sliding_window = 4
    base = transformers.Gemma2ForCausalLM(config).eval()
    state = load_random("gemma2").state_dict()
    base.load_state_dict(state)
    torch.manual_seed(1)
    attach(base, config_of("prefix", virtual_tokens=5))
    save(base, tmp_path, "base")
    other = transformers.Gemma2ForCausalLM(config).eval()
    other.load_state_dict(state)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    with torch.no_grad():
        assert_equal(logits(base), theirs(input_ids=IDS).logits)
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = base.generate(**prompt_inputs(base, IDS), **how)
    chosen = logits(base, found[:, :-1])[:, -8:].argmax(-1)
    assert torch.equal(found[:, 6:], chosen)
    objective = Objective(base)
    with documents_apart(base):
        loss, _ = gradients(base, objective, [batch_of(base, SAMPLES, padded=False)])
    expected, _ = gradients(base, objective, [batch_of(base, SAMPLES, padded=True)])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_half_precision_models_keep_their_prompts_in_fp32(load_random: Load, tmp_path: Path) -> None:
    for variant in VARIANTS:
        model = load_random("llama").to(torch.bfloat16)
        attach(model, config_of(variant))
        assert {p.dtype for p in find_soft_prompt(model).parameters()} == {torch.float32}
        expected = logits(model)
        assert expected.dtype == torch.bfloat16
        (tmp_path / variant).mkdir()
        save(model, tmp_path / variant, "base")
        again = load_random("llama").to(torch.bfloat16)
        load(again, tmp_path / variant)
        assert torch.equal(logits(again), expected)
