"""One step: packed as padded as plain transformers, 8 x 1 as 1 x 8, checkpointed as not, every learnt token alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora
from lory.data.mixture.collate import Batch, collate
from lory.models.attention import documents_apart
from lory.training.step import Objective, StepResult, evaluate_loss, train_step
from lory.types import IGNORE, Sample

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("Qwen2", {}),
    ("Mistral", {"sliding_window": 4}),
    (
        "Gemma2",
        {
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 6,
        },
    ),
    ("Gemma3Text", {"sliding_window": 4}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3}),
    ("GPTNeoX", {}),
]


def draw_samples(lengths: Sequence[int], vocabulary: int = 131, seed: int = 0) -> list[Sample]:
    """Random documents of which about half the tokens are learnt, the first included (it has no predecessor)."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        learnt = (torch.rand(length, generator=generator) < 0.5).tolist()
        learnt[0] = learnt[-1] = True
        labels = [token if keep else IGNORE for token, keep in zip(ids, learnt, strict=True)]
        samples.append(Sample(tuple(ids), tuple(labels)))
    return samples


SAMPLES = draw_samples([9, 2, 17, 5])


def plain_loss(model: Any, samples: Sequence[Sample]) -> Tensor:
    """The mean loss that transformers itself computes for padded samples with labels, by the model's own attention."""
    longest = max(len(sample) for sample in samples)

    def pad(rows: list[tuple[int, ...]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    mask = pad([(1,) * len(sample) for sample in samples], 0)
    ids, labels = pad([s.input_ids for s in samples], 0), pad([s.labels for s in samples], IGNORE)
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss


def our_loss(objective: Objective, batch: Batch) -> Tensor:
    sums = objective(batch)
    return sums.loss / sums.weight


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """All gradients together are within 1e-5 of the expected ones, relative to their norm, and each within `limit`."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - gradient).norm()) for name, gradient in expected.items()}
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    assert math.hypot(*errors.values()) < 1e-5 * math.hypot(*norms.values())
    # a gradient that is nothing but rounding (a key's bias has none) is measured by the largest there is
    floor = 1e-3 * max(norms.values())
    for name, error in errors.items():
        assert error < limit * max(norms[name], floor), f"{name}: {error / norms[name]:.1e}"


def assert_equals_plain(model: Any, samples: Sequence[Sample], packed: bool, limit: float = 1e-5) -> None:
    """Loss and gradients of the padded batch, and of the packed row, are those of transformers itself."""
    objective = Objective(model).train()
    expected = plain_loss(model, samples)
    expected_gradients = gradients(model, expected)
    found = our_loss(objective, collate(samples, padded=True))
    assert abs(found.item() / expected.item() - 1) < 1e-5
    assert_alike(gradients(model, found), expected_gradients, limit)
    if packed:
        with documents_apart(model):
            found = our_loss(objective, collate(samples))
            assert abs(found.item() / expected.item() - 1) < 1e-5
            assert_alike(gradients(model, found), expected_gradients, limit)


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_packed_and_padded_equal_plain_transformers(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any]
) -> None:
    model = random_model(family, **changes)
    assert_equals_plain(model, SAMPLES, packed=True)


def test_without_the_borders_it_would_not_be_the_same(random_model: Callable[..., Any]) -> None:
    # the assertions above can fail: one document made of all is another loss
    model = random_model("Llama")
    objective = Objective(model)
    joined = Sample(
        tuple(token for sample in SAMPLES for token in sample.input_ids),
        tuple(label for sample in SAMPLES for label in (IGNORE, *sample.labels[1:])),
    )
    with torch.no_grad(), documents_apart(model):
        leaking, apart = our_loss(objective, collate([joined])), our_loss(objective, collate(SAMPLES))
    assert abs(leaking / apart - 1) > 1e-3


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Bloom", {"n_layer": 2, "n_head": 4}), ("Mamba", {}), ("Rwkv", {"attention_hidden_size": 24})],
)
def test_models_that_cannot_pack_are_trained_padded(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any]
) -> None:
    model = random_model(family, **changes)
    assert_equals_plain(model, SAMPLES, packed=False)


@pytest.mark.slow
def test_packed_and_padded_equal_plain_transformers_on_smollm2(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    attach_lora(model, AdapterConfig(rank=4, alpha=8))
    torch.manual_seed(0)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.02)
    samples = draw_samples([17, 3, 31, 8], vocabulary=49152)
    # fp32's rounding adds up over 30 layers: all gradients together are within 4e-6, the worst of 420 within 2e-5
    assert_equals_plain(model, samples, packed=True, limit=5e-5)


class Trainer:
    """A random Llama in fp64 with an adapter, and what steps it."""

    def __init__(self, make: Callable[..., Any], learning_rate: float = 1e-2, checkpointing: bool = False) -> None:
        self.model = make("Llama").double()
        torch.manual_seed(1)
        attach_lora(self.model, AdapterConfig(rank=3, alpha=6))
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.objective = Objective(self.model).train()
        self.accelerator = Accelerator(cpu=True)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=learning_rate)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0)

    def step(
        self, micro_batches: Sequence[Sequence[Sample]], max_grad_norm: float = 1.0, padded: bool = False
    ) -> StepResult:
        batches = [collate(samples, padded) for samples in micro_batches]
        return train_step(self.objective, batches, self.optimizer, self.schedule, self.accelerator, max_grad_norm)

    def adapter(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def set_dropout(self, rate: float) -> None:
        for _, layer in adapted_layers(self.model):
            layer.lora_dropout = rate


@pytest.mark.parametrize("factor", [1e-3, 2.0])
def test_weights_that_are_all_the_same_change_nothing(random_model: Callable[..., Any], factor: float) -> None:
    plain, weighted = Trainer(random_model), Trainer(random_model)
    samples = [Sample(sample.input_ids, sample.labels, (factor,) * len(sample)) for sample in SAMPLES]
    ours, theirs = weighted.step([samples]), plain.step([SAMPLES])
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_batch_1_accumulated_8_times_equals_batch_8(random_model: Callable[..., Any], padded: bool) -> None:
    one_by_one, all_at_once = Trainer(random_model), Trainer(random_model)
    for step in range(5):
        # uneven lengths and uneven numbers of learnt tokens: a mean of means would differ
        samples = draw_samples([3, 25, 6, 2, 13, 9, 4, 18], seed=step)
        ours = one_by_one.step([[sample] for sample in samples], padded=padded)
        theirs = all_at_once.step([samples], padded=padded)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-9)
        assert (ours.tokens, ours.supervised_tokens) == (theirs.tokens, theirs.supervised_tokens)
        assert ours.token_accuracy == theirs.token_accuracy
    expected = all_at_once.adapter()
    for name, found in one_by_one.adapter().items():
        assert (found - expected[name]).abs().max() / expected[name].abs().max() < 1e-5, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(random_model: Callable[..., Any], dropout: float) -> None:
    plain, recomputed = Trainer(random_model), Trainer(random_model, checkpointing=True)
    for trainer in (plain, recomputed):
        trainer.set_dropout(dropout)
        torch.manual_seed(7)
        for step in range(3):
            samples = draw_samples([9, 2, 17, 5], seed=step)
            trainer.step([samples[:2], samples[2:]])
    assert any(
        module.gradient_checkpointing
        for module in recomputed.model.modules()
        if hasattr(module, "gradient_checkpointing")
    )
    expected = plain.adapter()
    for name, found in recomputed.adapter().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)


def test_checkpointing_recomputes_and_so_keeps_less(random_model: Callable[..., Any]) -> None:
    forwards = []
    for checkpointing in (False, True):
        trainer, calls = Trainer(random_model, checkpointing=checkpointing), []
        trainer.model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.step([SAMPLES])
        forwards.append(len(calls))
    assert forwards == [1, 2]


def test_the_loss_is_the_mean_over_all_learnt_tokens(random_model: Callable[..., Any]) -> None:
    trainer = Trainer(random_model)
    expected = plain_loss(trainer.model, SAMPLES).item()
    result = trainer.step([SAMPLES[:1], SAMPLES[1:]])
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.supervised_tokens == sum(sample.supervised for sample in SAMPLES)
    assert result.tokens == sum(len(sample) for sample in SAMPLES)


def test_the_gradient_norm_is_the_one_before_clipping(random_model: Callable[..., Any]) -> None:
    norms, moved = [], []
    for limit in (0.0, 1e6, 1e-3):
        trainer = Trainer(random_model)
        trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=1.0)
        trainer.schedule = LambdaLR(trainer.optimizer, lambda step: 1.0)
        before = trainer.adapter()
        norms.append(trainer.step([SAMPLES], limit).grad_norm)
        moved.append(math.sqrt(sum(float((p - before[n]).square().sum()) for n, p in trainer.adapter().items())))
    assert norms == [norms[0]] * 3
    assert moved[:2] == pytest.approx([norms[0]] * 2)
    assert moved[2] == pytest.approx(1e-3, rel=1e-3)


def test_a_micro_batch_in_which_nothing_is_learnt_adds_nothing(random_model: Callable[..., Any]) -> None:
    silent = Sample((5, 6, 7), (IGNORE,) * 3)
    with_it, without = Trainer(random_model), Trainer(random_model)
    ours, theirs = with_it.step([SAMPLES, [silent]]), without.step([SAMPLES])
    assert (ours.loss, ours.grad_norm, ours.supervised_tokens) == (
        theirs.loss,
        theirs.grad_norm,
        theirs.supervised_tokens,
    )
    for name, expected in without.adapter().items():
        assert torch.equal(with_it.adapter()[name], expected), name
    alone = with_it.step([[silent]])
    assert (alone.loss, alone.grad_norm, alone.supervised_tokens) == (0.0, 0.0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing(random_model: Callable[..., Any], bad: float) -> None:
    trainer = Trainer(random_model)
    trainer.step([SAMPLES])
    before = trainer.adapter()
    trainer.model.lm_head.weight[9] = bad
    result = trainer.step([SAMPLES])
    assert not math.isfinite(result.loss)
    assert trainer.schedule.last_epoch == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.adapter().items())
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_evaluation_gives_the_same_sums_and_leaves_the_mode(random_model: Callable[..., Any], padded: bool) -> None:
    trainer = Trainer(random_model)
    trainer.set_dropout(0.5)
    batches = [collate([sample], padded) for sample in SAMPLES]
    loss, correct, weight = evaluate_loss(trainer.objective, batches, trainer.accelerator).tolist()
    assert trainer.objective.training
    assert trainer.model.training
    assert weight == sum(sample.supervised for sample in SAMPLES)
    assert loss / weight == pytest.approx(plain_loss(trainer.model.eval(), SAMPLES).item(), rel=1e-6)
    assert 0 <= correct <= weight
    assert evaluate_loss(trainer.objective, [], trainer.accelerator).tolist() == [0.0, 0.0, 0.0]
