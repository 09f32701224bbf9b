"""Losses against repetition combine with packing, folding, accumulation and resuming."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.adapters.unadapted import unadapted
from lory.adapters.virtual_tokens import Leading
from lory.data.mixture.collate import Batch, collate
from lory.models.attention import documents_apart
from lory.runtime import UsageError
from lory.training.continuations import continue_texts, is_sequence_step
from lory.training.feed import Batching
from lory.training.monitor import read_log
from lory.training.objective import LossConfig, Objective, UnlikelihoodConfig
from lory.training.plan import make_batch
from lory.training.run import train
from lory.training.step import train_step
from lory.types import IGNORE, Sample

ALL = LossConfig.model_validate(
    {
        "unlikelihood": {"token": 0.7},
        "contrastive": {"weight": 0.5, "margin": 0.4},
        "divergence": 0.6,
        "embedding_noise": 0.0,
    }
)


def draw_samples(count: int = 6, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(3, 17, (), generator=generator))
        # few different tokens, so that many of the context are candidates
        ids = tuple(torch.randint(3, 20, (length,), generator=generator).tolist())
        start = int(torch.randint(0, length - 1, (), generator=generator))
        samples.append(Sample(ids, (*[IGNORE] * start, *ids[start:])))
    return samples


def adapt(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    attach_lora(model, AdapterConfig(rank=2, alpha=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model.double()


def gradients(model: PreTrainedModel, batches: list[Batch], config: LossConfig) -> tuple[Any, list[Tensor]]:
    """The result of a step, and the gradient that it would apply."""
    objective = Objective(model, config).train()
    found: list[Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.extend(p.grad.clone() for p in self.param_groups[0]["params"])

    optimizer = Recorder([p for p in model.parameters() if p.requires_grad], lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return train_step(objective, batches, optimizer, schedule, Accelerator(cpu=True), 0.0), found


@pytest.fixture
def model(random_model: Any) -> PreTrainedModel:
    return adapt(random_model("Llama"))


def literal(model: PreTrainedModel, samples: list[Sample], config: LossConfig) -> float:
    """The papers' sums written out, a document at a time; the means are over all learnt tokens and all documents."""
    total, learnt, contrastive = 0.0, 0, 0.0
    before = copy.deepcopy(model)
    for name, parameter in before.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.zero_()
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        output = model(ids, output_hidden_states=True, use_cache=False)
        log_probs = F.log_softmax(output.logits[0], -1)
        expected = F.log_softmax(before(ids).logits[0], -1)
        for place in range(1, len(sample)):
            if sample.labels[place] == IGNORE:
                continue
            target, scores = sample.labels[place], log_probs[place - 1]
            total -= scores[target].item()
            candidates = set(sample.input_ids[:place]) - {target}
            total -= config.unlikelihood.token * sum(torch.log1p(-scores[c].exp()).item() for c in candidates)
            p, q = scores, expected[place - 1]
            total += config.divergence * float((q.exp() * (q - p)).sum())
            learnt += 1
        states = F.normalize(output.hidden_states[-1][0], dim=-1)
        cosines = (states @ states.T)[~torch.eye(len(states), dtype=torch.bool)]
        contrastive += (cosines - 1 + config.contrastive.margin).clamp(min=0).mean().item()
    return total / learnt + config.contrastive.weight * contrastive / len(samples)


def test_the_loss_is_the_papers_sums(model: PreTrainedModel) -> None:
    samples = draw_samples()
    result, _ = gradients(model, [collate(samples)], ALL)
    ours = result.loss + ALL.contrastive.weight * result.parts["contrastive"]
    ours += ALL.divergence * result.parts["divergence"]
    assert ours == pytest.approx(literal(model, samples, ALL), abs=1e-9)


@pytest.mark.parametrize("layout", ["padded", "one by one", "folded"])
def test_the_gradient_does_not_depend_on_the_layout(model: PreTrainedModel, layout: str) -> None:
    samples = draw_samples()
    if layout == "folded":
        expected = gradients(model, [collate([*samples, *samples[:2], samples[0]])], ALL)
        found = gradients(model, [collate(samples, counts=[3, 2, 1, 1, 1, 1])], ALL)
    else:
        expected = gradients(model, [collate(samples)], ALL)
        batches = [collate(samples, padded=True)] if layout == "padded" else [collate([s]) for s in samples]
        found = gradients(model, batches, ALL)
    assert found[0].loss == pytest.approx(expected[0].loss, abs=1e-9)
    assert found[0].parts == pytest.approx(expected[0].parts, abs=1e-9)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_an_empty_micro_batch_adds_nothing(model: PreTrainedModel, padded: bool) -> None:
    samples = draw_samples()
    full, empty = (make_batch(samples, Counter(which), padded, pad_id=0) for which in (range(len(samples)), ()))
    alone, found = gradients(model, [full], ALL), gradients(model, [full, empty], ALL)
    assert (found[0].loss, found[0].parts) == (alone[0].loss, alone[0].parts)
    for ours, theirs in zip(found[1], alone[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_evaluation_is_the_likelihood_alone(model: PreTrainedModel) -> None:
    samples = draw_samples()
    objectives = Objective(model), Objective(model, ALL)
    with documents_apart(model), torch.no_grad():
        plain, ours = (objective.eval()(collate(samples)) for objective in objectives)
    assert [float(value) for value in ours] == [float(value) for value in plain]


def test_a_fresh_adapter_diverges_in_nothing(random_model: Any) -> None:
    model = random_model("Llama")
    attach_lora(model, AdapterConfig(rank=2, dropout=0.1))
    result, _ = gradients(model, [collate(draw_samples())], LossConfig(divergence=1.0))
    assert result.parts["divergence"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("adapter", [{"type": "dora"}, {"modules_to_save": ["lm_head"]}, {}])
def test_a_divergence_from_what_is_not_kept_is_refused(random_model: Any, adapter: dict[str, Any]) -> None:
    model = random_model("Llama")
    if adapter:
        attach_lora(model, AdapterConfig(**adapter))
    with pytest.raises(UsageError, match=r"use adapter.type=lora"):
        Objective(model, LossConfig(divergence=1.0))


def test_noise_comes_from_the_draw_and_only_in_training(model: PreTrainedModel) -> None:
    config = LossConfig(embedding_noise=5.0)
    objective, batch = Objective(model, config), collate(draw_samples())

    def loss(seed: int) -> float:
        with documents_apart(model), torch.no_grad():
            return float(objective(batch, torch.Generator().manual_seed(seed)).loss)

    assert loss(1) == loss(1) != loss(2)
    objective.eval()
    assert loss(1) == loss(2)


BATCHING = Batching(padded=False, pad_id=0, leading=Leading(), packing=True, max_tokens=64, folding=False)


@pytest.fixture
def parrot(model: PreTrainedModel) -> PreTrainedModel:
    """A model that answers everything with the token 9, again and again."""
    with torch.no_grad():
        model.base_model.norm.weight.zero_()
    linear = model.get_output_embeddings()
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features).double(), requires_grad=False)
    linear.bias[9] = 3.0
    return model


def continue_with(model: PreTrainedModel, samples: list[Sample], **changes: Any) -> tuple[Batch, list[list[int]]]:
    """The batch of what the model wrote, and its rows."""
    config = UnlikelihoodConfig(**{"prefix_tokens": 5, "completion_tokens": 12, "sequences": 99} | changes)
    batch = continue_texts(model, samples, BATCHING, config, [2], torch.Generator().manual_seed(0))
    return batch, [row.tolist() for row in batch.input_ids[0].split(batch.seq_lens.tolist())]


CHAT = Sample(tuple(range(3, 15)), (*[IGNORE] * 7, *range(10, 15)))
TEXT = Sample(tuple(range(30, 43)), tuple(range(30, 43)))
SHORT = Sample((3, 4), (3, 4))


def test_a_chat_is_continued_from_its_prompt_and_a_text_from_its_stretches(parrot: PreTrainedModel) -> None:
    batch, rows = continue_with(parrot, [CHAT, TEXT, SHORT])
    chat, first, second = sorted(rows)
    start = first[0]
    assert chat == [*range(3, 10), *[9] * 12]
    assert (first, second) == ([*range(start, start + 5), *[9] * 12], [*range(start + 5, start + 10), *[9] * 12])
    assert 30 <= start <= 33
    assert batch.continues


def test_so_many_texts_are_continued_as_the_config_says(parrot: PreTrainedModel) -> None:
    _, rows = continue_with(parrot, [TEXT] * 5, sequences=3)
    assert len(rows) == 3


@pytest.mark.parametrize(("penalize", "marked"), [("ngram", range(1, 12)), ("last", range(4, 12))])
def test_marked_is_what_repeats(parrot: PreTrainedModel, penalize: str, marked: range) -> None:
    batch, rows = continue_with(parrot, [CHAT], penalize=penalize)
    assert rows == [[*range(3, 10), *[9] * 12]]
    assert batch.weights is not None
    # the target of a place is the token after it
    assert batch.weights[0].nonzero().squeeze(1).tolist() == [7 + place - 1 for place in marked]


def test_what_repeats_nothing_is_not_run_again_but_counts(model: PreTrainedModel) -> None:
    batch, rows = continue_with(model, [TEXT, SHORT], completion_tokens=8, ngram=8)
    assert rows == [[2, 2]]
    assert batch.weight == 0
    assert 8 <= batch.learnt <= 16


def test_writing_leaves_the_weights_where_they_were(model: PreTrainedModel) -> None:
    model.float().train()
    before = [(p.data_ptr(), p.stride(), p.clone()) for p in model.parameters()]
    continue_with(model, [TEXT])
    assert model.training
    for parameter, (place, stride, values) in zip(model.parameters(), before, strict=True):
        assert (parameter.data_ptr(), parameter.stride()) == (place, stride)
        assert torch.equal(parameter, values)


def test_the_sequence_loss_is_minus_log_one_minus_p_of_what_is_repeated(model: PreTrainedModel) -> None:
    prefix, answer = (3, 4, 5), (6, 7, 8, 9, 6, 7, 8, 9, 10)
    repeated = list(range(4, 8))
    sample = Sample(
        prefix + answer,
        (IGNORE,) * 3 + answer,
        (0.0,) * 3 + tuple(float(place in repeated) for place in range(len(answer))),
    )
    batch = replace(collate([sample]), continues=True)
    config = LossConfig.model_validate({"unlikelihood": {"sequence": 2.0}})
    result, found = gradients(model, [collate(draw_samples()), batch], config)
    log_probs = F.log_softmax(model(torch.tensor([prefix + answer])).logits[0], -1)
    loss = -sum(torch.log1p(-log_probs[3 + place - 1, answer[place]].exp()) for place in repeated) / len(answer)
    assert result.parts["sequence_unlikelihood"] == pytest.approx(float(loss), abs=1e-9)
    alone, plain = gradients(model, [collate(draw_samples())], config)
    assert alone.loss == pytest.approx(result.loss, abs=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs, grad in zip(found, plain, torch.autograd.grad(2.0 * loss, parameters), strict=True):
        torch.testing.assert_close(ours, theirs + grad, atol=1e-9, rtol=1e-7)


def test_what_continuations_do_not_repeat_is_held_where_it_was(random_model: Any) -> None:
    model = adapt(random_model("Llama"))
    prefix, answer, repeated = (3, 4, 5), (6, 7, 8, 9, 6, 7, 8, 9, 10), range(4, 8)
    weights = (0.0,) * 3 + tuple(float(place in repeated) for place in range(len(answer)))
    sample = Sample(prefix + answer, (IGNORE,) * 3 + answer, weights)
    batch = replace(collate([sample]), continues=True)
    config = LossConfig.model_validate({"unlikelihood": {"divergence": 3.0}})
    result, found = gradients(model, [batch], config)

    def read() -> Tensor:
        return F.log_softmax(model(torch.tensor([prefix + answer])).logits[0], -1)

    now = read()
    with unadapted(model), torch.no_grad():
        before = read()
    each = (before.exp() * (before - now)).sum(-1)
    distance = sum(each[2 + place] for place in range(len(answer)) if place not in repeated) / len(answer)
    loss = -sum(torch.log1p(-now[2 + place, answer[place]].exp()) for place in repeated) / len(answer)
    assert result.parts["continued_divergence"] == pytest.approx(float(distance), abs=1e-9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, grad in zip(found, torch.autograd.grad(loss + 3.0 * distance, parameters), strict=True):
        torch.testing.assert_close(ours, grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_the_rate_is_the_share_of_steps(rate: float) -> None:
    config = UnlikelihoodConfig(sequence_rate=rate)
    steps = [is_sequence_step(config, 3, step) for step in range(400)]
    assert sum(steps) == 400 * rate
    assert steps == [is_sequence_step(config, 3, step) for step in range(400)]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "last" / "adapter_model.safetensors")


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_run_is_the_same(quick: dict[str, Any], packing: bool) -> None:
    quick["data"]["packing"] = packing
    quick["loss"] = {
        "unlikelihood": {"token": 0.5, "sequence_rate": 0.5, "sequences": 3, "completion_tokens": 16},
        "contrastive": {"weight": 0.3},
        "divergence": 0.5,
        "embedding_noise": 2.0,
    }
    quick["train"] |= {"max_steps": 6, "keep_checkpoints": 99, "save_every_steps": 2, "batch_size": 1}
    run = train(quick).folder
    expected, log = weights(run), [line for line in read_log(run) if "grad_norm" in line]
    assert all(line["token_unlikelihood"] > 0 and line["contrastive"] >= 0 for line in log)
    assert sum("sequence_unlikelihood" in line for line in log) == 3
    train(run, resume="checkpoint-2")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())


def test_without_extra_losses_the_log_is_as_ever(quick: dict[str, Any]) -> None:
    quick["train"] |= {"max_steps": 1}
    (line,) = [line for line in read_log(train(quick).folder) if "grad_norm" in line]
    assert not {"token_unlikelihood", "sequence_unlikelihood", "contrastive", "divergence"} & line.keys()
    assert json.dumps(line)
