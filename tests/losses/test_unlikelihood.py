"""The unlikelihood losses equal the paper's equations written out over all logits, in value and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.losses.cross_entropy import cross_entropy
from lory.losses.unlikelihood import cross_entropy_with_unlikelihood, repeated_ngram_mask, sequence_unlikelihood
from lory.metrics.repetition import seq_rep_n
from lory.runtime import UsageError
from lory.types import IGNORE

WIDTH, VOCABULARY = 7, 13


def literal_candidates(input_ids: list[int], labels: list[int], lengths: list[int]) -> list[set[int]]:
    """C_t of the paper at each index: the document's tokens up to there, without the token to be predicted."""
    candidates, begin = [], 0
    for length in lengths:
        for place in range(begin, begin + length):
            candidates.append(set(input_ids[begin : place + 1]) - {labels[place]})
        begin += length
    return candidates


def literal_token_loss(logits: Tensor, labels: Tensor, candidates: list[set[int]], alpha: float) -> Tensor:
    """The sum over learnt t of -log p(x_t) - alpha * sum over c in C_t of log(1 - p(c)), term by term."""
    p = logits.softmax(-1)
    loss = logits.sum() * 0.0
    for t, label in enumerate(labels.tolist()):
        if label != IGNORE:
            loss = loss - p[t, label].log()
            for candidate in candidates[t]:
                loss = loss - alpha * torch.log(1 - p[t, candidate])
    return loss


def draw(lengths: list[int], ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Hidden states (N, H), a head, labels (N) and input ids (N) of documents, in fp64."""
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY).double()
    # wide enough that some p are far beyond 1/2
    hidden = (4 * torch.randn(sum(lengths), WIDTH, dtype=torch.float64)).requires_grad_()
    input_ids = torch.randint(VOCABULARY, (sum(lengths),))
    labels = input_ids.roll(-1)
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    labels[torch.rand(len(labels)) < ignored] = IGNORE
    return hidden, head, labels, input_ids


def assert_same(found: Tensor, expected: Tensor, tensors: list[Tensor]) -> None:
    """Both in value and in the gradient of each of the tensors."""
    torch.testing.assert_close(found, expected)
    # 1.7: the gradient from above is not always 1
    ours = torch.autograd.grad(1.7 * found, tensors)
    theirs = torch.autograd.grad(1.7 * expected, tensors)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("lengths", [[1], [2], [17], [1, 1, 9, 1, 30, 2], [40, 3]])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_token_level_equals_the_equations_taken_literally(lengths: list[int], chunk_tokens: int, alpha: float) -> None:
    hidden, head, labels, input_ids = draw(lengths)
    parameters = list(head.parameters())
    found = cross_entropy_with_unlikelihood(
        hidden, head, labels, input_ids, torch.tensor(lengths), alpha, parameters, chunk_tokens=chunk_tokens
    )
    candidates = literal_candidates(input_ids.tolist(), labels.tolist(), lengths)
    logits = head(hidden)
    expected = literal_token_loss(logits, labels, candidates, alpha)
    assert_same(found.loss, expected, [hidden, *parameters])
    plain = cross_entropy(hidden, head, labels)
    torch.testing.assert_close(found.likelihood, plain.loss)
    assert found.weight == plain.weight
    assert found.correct == plain.correct
    torch.testing.assert_close(found.likelihood + alpha * found.unlikelihood, found.loss)


def test_the_example_of_the_docstring() -> None:
    # p = (1/4, 1/4, 1/2); target 0; the context is 1, 2
    states = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, math.log(2)]], dtype=torch.float64)
    labels, input_ids = torch.tensor([IGNORE, 0]), torch.tensor([1, 2])
    found = cross_entropy_with_unlikelihood(states, nn.Identity(), labels, input_ids, torch.tensor([2]))
    assert found.likelihood.item() == pytest.approx(math.log(4))
    assert found.unlikelihood.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))


def test_the_target_is_no_candidate_even_if_it_stands_in_the_context() -> None:
    states = torch.zeros(2, 3, dtype=torch.float64)
    labels, input_ids = torch.tensor([IGNORE, 1]), torch.tensor([1, 1])
    found = cross_entropy_with_unlikelihood(states, nn.Identity(), labels, input_ids, torch.tensor([2]))
    assert found.unlikelihood == 0


def test_documents_share_no_context() -> None:
    hidden, head, labels, input_ids = draw([6, 9])
    together = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, torch.tensor([6, 9])).unlikelihood
    alone = [
        cross_entropy_with_unlikelihood(hidden[s], head, labels[s], input_ids[s], torch.tensor([n])).unlikelihood
        for s, n in ((slice(0, 6), 6), (slice(6, 15), 9))
    ]
    torch.testing.assert_close(together, alone[0] + alone[1])
    mixed = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, torch.tensor([15])).unlikelihood
    assert mixed > together


def test_padded_rows_equal_packed_ones() -> None:
    hidden, head, labels, input_ids = draw([6, 9])

    def pad(values: Tensor, filler: int) -> Tensor:
        rows = nn.utils.rnn.pad_sequence(values.detach().split([6, 9]), batch_first=True, padding_value=filler)
        return rows.flatten(0, 1)

    packed = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, torch.tensor([6, 9]))
    padded = cross_entropy_with_unlikelihood(
        pad(hidden, 0), head, pad(labels, IGNORE), pad(input_ids, 0), torch.tensor([9, 9])
    )
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_scale_each_token_of_both_parts() -> None:
    hidden, head, labels, input_ids = draw([12, 5])
    weights = torch.rand(17, dtype=torch.float64)
    found = cross_entropy_with_unlikelihood(
        hidden, head, labels, input_ids, torch.tensor([12, 5]), 0.7, weights=weights, chunk_tokens=4
    )
    logits = head(hidden)
    candidates = literal_candidates(input_ids.tolist(), labels.tolist(), [12, 5])
    terms = [
        weight * literal_token_loss(logits[t : t + 1], labels[t : t + 1], candidates[t : t + 1], 0.7)
        for t, weight in enumerate(weights)
    ]
    torch.testing.assert_close(found.loss, sum(terms))
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (found.loss, sum(terms))))
    torch.testing.assert_close(found.weight, weights[labels != IGNORE].sum())


def test_only_eligible_tokens_become_candidates() -> None:
    hidden, head, labels, input_ids = draw([12, 5])
    eligible = torch.rand(17) < 0.5
    found = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, torch.tensor([17]), eligible=eligible)
    candidates = [
        {token for token, may in zip(input_ids[: t + 1].tolist(), eligible, strict=False) if may} - {label}
        for t, label in enumerate(labels.tolist())
    ]
    torch.testing.assert_close(found.loss, literal_token_loss(head(hidden), labels, candidates, 1.0))
    none = cross_entropy_with_unlikelihood(
        hidden, head, labels, input_ids, torch.tensor([17]), eligible=torch.zeros(17, dtype=torch.bool)
    )
    assert none.unlikelihood == 0


def test_ids_beyond_the_vocabulary_are_never_candidates() -> None:
    hidden, head, labels, input_ids = draw([12])
    eligible = torch.ones(12, dtype=torch.bool)
    eligible[:3] = False
    lengths = torch.tensor([12])
    expected = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, lengths, eligible=eligible)
    input_ids[:3] = torch.tensor([VOCABULARY, VOCABULARY + 1, VOCABULARY])
    found = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, lengths)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("chunk_tokens", [3, 1000])
def test_gradcheck_through_a_capped_head(chunk_tokens: int) -> None:
    hidden, head, labels, input_ids = draw([3, 8])

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        def capped(states: Tensor) -> Tensor:
            return 3.0 * torch.tanh(F.linear(states, weight, bias) / 3.0)

        lengths = torch.tensor([3, 8])
        token = cross_entropy_with_unlikelihood(
            hidden, capped, labels, input_ids, lengths, 0.7, [weight, bias], chunk_tokens=chunk_tokens
        )
        repeated = torch.arange(11) % 3 > 0
        sequence, _ = sequence_unlikelihood(hidden, capped, labels, repeated, [weight, bias], chunk_tokens)
        near, _ = sequence_unlikelihood(hidden, capped, labels, repeated, [weight, bias], chunk_tokens, rivals=2)
        return token.loss, sequence, near

    assert torch.autograd.gradcheck(both, (hidden, head.weight, head.bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("margin", [0.0, 1.0, 30.0, 1000.0])
def test_finite_and_right_however_sure_the_model_is(dtype: torch.dtype, margin: float) -> None:
    # token 2 is a wrong repeat that the model is sure of: log(1 - p) = log(3) - log(3 + e^margin)
    logits = torch.zeros(2, 4, dtype=dtype)
    logits[1, 2] = margin
    logits.requires_grad_()
    labels, input_ids, lengths = torch.tensor([IGNORE, 0]), torch.tensor([2, 2]), torch.tensor([2])
    found = cross_entropy_with_unlikelihood(logits, nn.Identity(), labels, input_ids, lengths)
    sequence, _ = sequence_unlikelihood(logits, nn.Identity(), torch.tensor([IGNORE, 2]), torch.tensor([False, True]))
    expected = margin + math.log(3 * math.exp(-margin) + 1) - math.log(3)
    assert found.unlikelihood.item() == pytest.approx(expected, rel=1e-5)
    assert sequence.item() == pytest.approx(expected, rel=1e-5)
    for loss in (found.loss, sequence):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert gradient.isfinite().all()
        # the surer, the nearer to 1 the push down on the repeat
        p = 1 / (1 + 3 * math.exp(-margin))
        assert gradient[1, 2].item() == pytest.approx(p if loss is sequence else 2 * p, rel=1e-2)


def test_bf16_states_and_head_are_summed_in_fp32() -> None:
    hidden, head, labels, input_ids = draw([40, 3])
    states = hidden.detach().bfloat16().requires_grad_()
    head = head.bfloat16()
    found = cross_entropy_with_unlikelihood(
        states, head, labels, input_ids, torch.tensor([40, 3]), 0.7, list(head.parameters()), chunk_tokens=10
    )
    logits = head(states.detach()).double()  # bf16's own rounding of the logits is not the loss's
    candidates = literal_candidates(input_ids.tolist(), labels.tolist(), [40, 3])
    expected = literal_token_loss(logits, labels, candidates, 0.7)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=0)
    found.loss.backward()
    assert states.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    exact = hidden.detach().requires_grad_()
    literal_token_loss(head.double()(exact), labels, candidates, 0.7).backward()
    assert (states.grad.double() - exact.grad).norm() / exact.grad.norm() < 0.03


@pytest.mark.parametrize("tokens", [1, 5])
def test_nothing_learnt_is_a_zero_that_keeps_the_graph(tokens: int) -> None:
    hidden, head, labels, input_ids = draw([tokens], ignored=1.1)
    lengths = torch.tensor([tokens])
    found = cross_entropy_with_unlikelihood(
        hidden, head, labels, input_ids, lengths, parameters=list(head.parameters())
    )
    assert [value.item() for value in found] == [0.0] * 5
    found.loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_without_gradients_none_are_computed() -> None:
    hidden, head, labels, input_ids = draw([9])
    calls: list[bool] = []

    def watched(states: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return head(states)

    trained = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, torch.tensor([9]))
    with torch.no_grad():
        found = cross_entropy_with_unlikelihood(hidden, watched, labels, input_ids, torch.tensor([9]), chunk_tokens=4)
        sequence, _ = sequence_unlikelihood(hidden, watched, labels, labels != IGNORE, chunk_tokens=4)
    assert calls
    assert not any(calls)
    assert not found.loss.requires_grad
    assert not sequence.requires_grad
    torch.testing.assert_close(found.loss, trained.loss.detach())


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    hidden, head, labels, input_ids = draw([9])
    loss = cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, torch.tensor([9])).loss
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_neither_keeps_logits_nor_makes_more_than_a_chunk_of_them() -> None:
    tokens, vocabulary = 64, 1000
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, vocabulary)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    ids = torch.randint(vocabulary, (tokens,))
    asked: list[int] = []
    kept: list[int] = []

    def watched(states: Tensor) -> Tensor:
        asked.append(len(states))
        return head(states)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for make in (
            lambda: (
                cross_entropy_with_unlikelihood(
                    hidden, watched, ids.roll(-1), ids, torch.tensor([tokens]), chunk_tokens=8
                ).loss
            ),
            lambda: sequence_unlikelihood(hidden, watched, ids, torch.ones(tokens, dtype=torch.bool), chunk_tokens=8)[
                0
            ],
        ):
            make().backward()
    assert asked == [8] * 16
    # the head's own weight and a chunk of states inside of the function; what lives on until backward is (N, H)
    assert max(kept) <= max(head.weight.numel(), tokens * WIDTH)


def test_lengths_that_do_not_fit_are_refused() -> None:
    hidden, head, labels, input_ids = draw([9])
    with pytest.raises(UsageError, match="adds up to 8, but there are 9 tokens"):
        cross_entropy_with_unlikelihood(hidden, head, labels, input_ids, torch.tensor([8]))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_sequence_level_equals_the_equation_taken_literally(chunk_tokens: int) -> None:
    hidden, head, labels, _ = draw([30])
    parameters = list(head.parameters())
    repeated = torch.rand(30) < 0.6
    found, weight = sequence_unlikelihood(hidden, head, labels, repeated, parameters, chunk_tokens)
    p = head(hidden).softmax(-1)
    flagged = [t for t in range(30) if repeated[t] and labels[t] != IGNORE]
    expected = -sum(torch.log(1 - p[t, labels[t]]) for t in flagged)
    assert_same(found, expected, [hidden, *parameters])
    # the paper divides by all tokens of the continuations, not by the repeated ones
    assert weight == (labels != IGNORE).sum()


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("rivals", [1, 3, VOCABULARY - 1, 1000])
def test_among_rivals_it_equals_the_equation_taken_literally(rivals: int, chunk_tokens: int) -> None:
    hidden, head, labels, _ = draw([30])
    parameters = list(head.parameters())
    repeated = torch.rand(30) < 0.6
    found, weight = sequence_unlikelihood(hidden, head, labels, repeated, parameters, chunk_tokens, rivals)
    p = head(hidden).softmax(-1)
    expected = torch.zeros(())
    for t, label in enumerate(labels.tolist()):
        if repeated[t] and label != IGNORE:
            others = torch.cat([p[t, :label], p[t, label + 1 :]]).sort(descending=True).values[:rivals].sum()
            expected = expected - torch.log(others / (p[t, label] + others))
    assert_same(found, expected, [hidden, *parameters])
    assert weight == (labels != IGNORE).sum()
    if rivals >= VOCABULARY - 1:
        torch.testing.assert_close(found, sequence_unlikelihood(hidden, head, labels, repeated, parameters)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_token_that_leads_with_little_probability_is_pushed_where_it_has_rivals(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 100, dtype=dtype).index_fill(1, torch.tensor([7]), 1.0).requires_grad_()
    labels, repeated = torch.tensor([7]), torch.tensor([True])
    pushes = []
    for rivals in (None, 1):
        loss, _ = sequence_unlikelihood(logits, nn.Identity(), labels, repeated, rivals=rivals)
        pushes.append(torch.autograd.grad(loss, logits)[0][0, 7].item())
    # p = e / (e + 99), and among two e / (e + 1)
    assert pushes == pytest.approx([0.0267, 0.7311], rel=1e-2)


@pytest.mark.parametrize("margin", [30.0, 1000.0])
def test_rivals_stay_finite_however_sure_the_model_is(margin: float) -> None:
    logits = torch.zeros(1, 4).index_fill(1, torch.tensor([2]), margin).requires_grad_()
    loss, _ = sequence_unlikelihood(logits, nn.Identity(), torch.tensor([2]), torch.tensor([True]), rivals=3)
    assert loss.item() == pytest.approx(margin - math.log(3))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[-1 / 3, -1 / 3, 1.0, -1 / 3]]))


def test_continuations_without_repetition_are_a_zero_that_keeps_the_graph() -> None:
    hidden, head, labels, _ = draw([9])
    found, weight = sequence_unlikelihood(hidden, head, labels, torch.zeros(9, dtype=torch.bool))
    assert found == 0
    assert weight == (labels != IGNORE).sum()
    found.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def literal_mask(row: list[int], n: int, last: bool = False) -> list[bool]:
    seen, mask = set(), [False] * len(row)
    for start in range(len(row) - n + 1):
        ngram = tuple(row[start : start + n])
        if ngram in seen:
            for place in range(start + n - 1 if last else start, start + n):
                mask[place] = True
        seen.add(ngram)
    return mask


@pytest.mark.parametrize("n", [1, 2, 4, 9])
@pytest.mark.parametrize("width", [0, 1, 4, 60])
@pytest.mark.parametrize("last", [False, True])
def test_repeated_ngrams_are_those_that_began_before(n: int, width: int, last: bool) -> None:
    torch.manual_seed(n)
    ids = torch.randint(3, (5, width))
    lengths = torch.randint(width + 1, (5,))
    assert repeated_ngram_mask(ids, n, last=last).tolist() == [literal_mask(row, n, last) for row in ids.tolist()]
    cut = repeated_ngram_mask(ids, n, lengths, last).tolist()
    for row, length, found in zip(ids.tolist(), lengths.tolist(), cut, strict=True):
        assert found == literal_mask(row[:length], n, last) + [False] * (width - length)


def test_repeated_ngrams_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2, 4], [7, 7, 7, 7, 7, 8]])
    assert repeated_ngram_mask(ids, 2).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0]]
    # overlapping n-grams count, as they do in seq-rep-4
    assert repeated_ngram_mask(ids, 4).int().tolist() == [[0] * 6, [0, 1, 1, 1, 1, 0]]
    assert seq_rep_n([7] * 5, 4) == 0.5


def test_nothing_is_flagged_where_seq_rep_n_is_zero() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 2, 3, 4, 6]])
    assert seq_rep_n(ids[0], 4) == 0
    assert not repeated_ngram_mask(ids).any()
    assert seq_rep_n(ids[0], 3) > 0
    assert repeated_ngram_mask(ids, 3).any()


def test_an_ngram_of_no_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="n = 0 was given"):
        repeated_ngram_mask(torch.ones(1, 3, dtype=torch.long), 0)
