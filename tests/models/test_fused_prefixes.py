"""Rows without what need not be computed give the states and gradients that each document gives alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models.test_fused_layer import FAMILIES, ODD, assert_alike, fuse, prepare, run_ordinarily
from torch import Tensor

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.data.mixture.collate import collate
from lory.models import fused_body
from lory.models.fused_body import FusedLayers
from lory.models.fused_layer import run_layer
from lory.models.fused_prefixes import LEAST_TOKENS, Run, compact, cut
from lory.training.objective import LossConfig, Objective
from lory.types import IGNORE, Sample

Documents = Sequence[Sequence[int]]


def draw_tree(seed: int, documents: int = 7) -> list[list[int]]:
    """Documents that each go on from somewhere in another, or begin anew."""
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    found: list[list[int]] = []
    for number in range(documents):
        other = found[draw(0, number - 1)] if number and draw(0, 4) else []
        tail = torch.randint(3, 131, (draw(0, 90),), generator=generator).tolist()
        found.append([*other[: draw(0, len(other))], *tail] or [5])
    return found


PROMPT = draw_tree(0, 1)[0][:12] + list(range(20, 30))
SETS: dict[str, list[list[int]]] = {
    "a prompt": [[*PROMPT, *range(30, 90)], [3], [*PROMPT, 7], [*PROMPT, *range(40, 45)]],
    "equal documents": [[*PROMPT, 4], PROMPT, [*PROMPT, 4], PROMPT],
    "one within another": [[*PROMPT, *range(90, 130)], PROMPT, [*PROMPT, *range(90, 120), 8]],
    "two prompts": [[*PROMPT, 7, 8], [9, *PROMPT], [*PROMPT, 6], [9, *PROMPT, 6, 6]],
    "a long prompt": [[*PROMPT * 9, *range(3, 120)], [*PROMPT * 9, *range(50, 60)], [*PROMPT * 9, 1, 1]],
    **{f"tree {seed}": draw_tree(seed) for seed in (1, 2, 3, 5, 7)},
}


def join(documents: Documents) -> tuple[Tensor, Tensor]:
    """(1, T) ids and the documents' lengths."""
    return torch.tensor([*itertools.chain(*documents)])[None], torch.tensor([len(ids) for ids in documents])


def spy_on_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each layer is given."""
    lengths: list[int] = []

    def run(layer: Any, x: Tensor, *rest: Any) -> Tensor:
        lengths.append(len(x))
        return run_layer(layer, x, *rest)

    monkeypatch.setattr(fused_body, "run_layer", run)
    return lengths


def test_the_last_layer_gives_states_of_wanted_tokens_only(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any]
) -> None:
    given: list[tuple[int, int]] = []

    def run(layer: Any, x: Tensor, *rest: Any) -> Tensor:
        y = run_layer(layer, x, *rest)
        given.append((len(x), len(y)))
        return y

    monkeypatch.setattr(fused_body, "run_layer", run)
    model = prepare(random_model("Llama", **ODD))
    ids, lengths = join(SETS["a prompt"])
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    wanted[0, [1, 30, 40]] = True
    fused = fuse(model)
    given.clear()
    fused(ids, lengths, wanted)
    assert len(given) > 1
    assert all(tokens == states for tokens, states in given[:-1])
    assert given[-1][1] == 3


@pytest.mark.parametrize("documents", SETS.values(), ids=SETS)
def test_every_token_finds_its_document(documents: list[list[int]]) -> None:
    ids, lengths = join(documents)
    row = compact(ids[0], lengths.tolist())
    assert row.last is None
    assert torch.equal(ids[0, row.kept][row.places], ids[0])
    assert torch.equal(row.positions[row.places], torch.cat([torch.arange(n) for n in lengths.tolist()]))
    assert row.borders[0] == 0
    assert row.borders[-1] == len(row.kept) < len(ids[0])
    for (start, end), before in zip(itertools.pairwise(row.borders), row.before, strict=True):
        path = [*itertools.chain(*(range(first, first + length) for first, length in before)), *range(start, end)]
        assert ids[0, row.kept[path]].tolist() in documents
        assert row.positions[path].tolist() == list(range(len(path)))


def test_each_beginning_is_kept_once() -> None:
    documents = [[*PROMPT, *PROMPT, 1], [2, 2, 2], [*PROMPT, 3], [*PROMPT, *PROMPT, 4, 4]]
    row = compact(join(documents)[0][0], [len(ids) for ids in documents])
    assert len(row.kept) == 2 * len(PROMPT) + 1 + 3 + 1 + 2


@pytest.mark.parametrize("common", [0, 1, LEAST_TOKENS - 1])
def test_little_in_common_is_not_shared(common: int) -> None:
    documents = [[*range(common), 50, 51], [*range(common), 60]]
    row = compact(join(documents)[0][0], [common + 2, common + 1])
    assert len(row.kept) == 2 * common + 3
    assert row.before == ((), ())


def test_tokens_behind_the_last_wanted_one_are_left_out() -> None:
    documents = [[*PROMPT, 7, 8, 9], [5, 6], [*PROMPT, 7, 1]]
    wanted = torch.zeros(sum(map(len, documents)), dtype=torch.bool)
    # the first document's second but last, the prompt's last in both, and nothing of the second
    first, last = len(PROMPT), len(PROMPT) + 3 + 2 + len(PROMPT) - 1
    wanted[[first - 1, first, last]] = True
    row = compact(join(documents)[0][0], [len(ids) for ids in documents], wanted)
    # of a document in which nothing is wanted, one token
    assert row.positions.tolist() == [0, *range(len(PROMPT)), len(PROMPT)]
    assert row.last is not None
    assert row.positions[row.last][row.places[wanted]].tolist() == [len(PROMPT) - 1, len(PROMPT), len(PROMPT) - 1]
    assert len(row.last) == 2


def test_where_nothing_is_wanted_all_is_computed() -> None:
    row = compact(torch.arange(5), [3, 2], torch.zeros(5, dtype=torch.bool))
    assert len(row.kept) == 5
    assert row.last is None


def test_a_path_is_cut_across_its_runs() -> None:
    path = (Run(3, 4), Run(20, 2), Run(30, 5))
    assert cut(path, 0, 11) == path
    assert cut(path, 2, 7) == (Run(5, 2), Run(20, 2), Run(30, 1))
    assert cut(path, 4, 6) == (Run(20, 2),)
    assert cut(path, 5, 5) == ()


@pytest.mark.parametrize("documents", SETS.values(), ids=SETS)
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_states_and_gradients_are_each_documents_own(
    monkeypatch: pytest.MonkeyPatch,
    random_model: Callable[..., Any],
    family: str,
    changes: dict[str, Any],
    documents: list[list[int]],
) -> None:
    model = prepare(random_model(family, **(ODD | changes | {"max_position_embeddings": 512})))
    ids, lengths = join(documents)
    fused, given = fuse(model), spy_on_layers(monkeypatch)
    found = fused(ids, lengths)
    assert max(given) < int(lengths.sum())
    assert_alike(model, found, run_ordinarily(model, ids, lengths), 1e-10)


@pytest.mark.parametrize("documents", SETS.values(), ids=SETS)
def test_in_single_precision_they_differ_by_rounding(
    random_model: Callable[..., Any], documents: list[list[int]]
) -> None:
    model = prepare(random_model("Llama", **(ODD | {"max_position_embeddings": 512})), torch.float32)
    ids, lengths = join(documents)
    assert_alike(model, fuse(model)(ids, lengths), run_ordinarily(model, ids, lengths), 2e-5)


@pytest.mark.parametrize("settings", [{}, {"targets": ["q_proj", "v_proj"]}, {"targets": ["down_proj"], "layers": [1]}])
@pytest.mark.parametrize("documents", SETS.values(), ids=SETS)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_wanted_states_and_their_gradients_are_the_same(
    random_model: Callable[..., Any], documents: list[list[int]], share: float, settings: dict[str, Any]
) -> None:
    model = prepare(random_model("Qwen3", **(ODD | {"max_position_embeddings": 512})), **settings)
    ids, lengths = join(documents)
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < share
    wanted[0, 1] = True
    found = fuse(model)(ids, lengths, wanted)
    assert found.shape[:2] == ids.shape
    assert_alike(model, found[wanted], run_ordinarily(model, ids, lengths)[wanted], 1e-10)


def test_an_embedding_that_is_trained_hears_of_every_document(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Llama", **ODD), targets=["v_proj"])
    model.get_input_embeddings().weight.requires_grad = True
    ids, lengths = join(SETS["two prompts"])
    assert_alike(model, fuse(model)(ids, lengths), run_ordinarily(model, ids, lengths), 1e-10)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"contrastive": {"weight": 0.5}},
        {"divergence": 0.3},
        {"unlikelihood": {"token": 0.7}},
        {"unlikelihood": {"sequence_rate": 1.0, "divergence": 0.4}},
    ],
    ids=["likelihood", "contrastive", "divergence", "unlikelihood", "continuations"],
)
@pytest.mark.parametrize("counts", [None, [3, 1, 2]])
def test_every_loss_is_the_same_with_and_without(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any], config: dict[str, Any], counts: list[int] | None
) -> None:
    model = prepare(random_model("Qwen3", **(ODD | {"max_position_embeddings": 512})))
    # learnt throughout: shared tokens predict the same and, at their end, different tokens
    samples = [Sample(tuple(ids), tuple(ids)) for ids in SETS["a long prompt"][:2]]
    ids = SETS["a long prompt"][2]
    samples.append(Sample(tuple(ids), (*[IGNORE] * (len(ids) - 1), ids[-1])))
    objective, given = Objective(model, LossConfig(**config)).train(), spy_on_layers(monkeypatch)
    batch = collate(samples, counts=counts)
    if "sequence_rate" in config.get("unlikelihood", {}):
        repeated = torch.rand(batch.targets.shape, generator=torch.Generator().manual_seed(2)) < 0.3
        batch = replace(batch, continues=True, weights=repeated.float())

    def learn() -> tuple[float, list[Tensor]]:
        terms = objective(batch)
        loss = terms.loss + terms.contrastive + terms.divergence
        return loss.item(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    loss, gradients = learn()
    assert max(given) < batch.tokens
    given.clear()
    monkeypatch.setattr(FusedLayers, "_drops", lambda _: True)
    expected, others = learn()
    assert set(given) == {batch.tokens}
    assert loss == pytest.approx(expected, rel=1e-12)
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_with_dropout_each_document_has_its_own(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any]
) -> None:
    model = random_model("Llama", **ODD)
    attach_lora(model, AdapterConfig(rank=2, dropout=0.3))
    ids, lengths = join(SETS["a prompt"])
    fused, given = fuse(model.train()), spy_on_layers(monkeypatch)
    fused(ids, lengths)
    assert set(given) == {int(lengths.sum())}
    given.clear()
    model.eval()
    fused(ids, lengths)
    assert max(given) < int(lengths.sum())
