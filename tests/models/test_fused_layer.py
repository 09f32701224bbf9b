"""Fused layers give the states, the loss and every gradient of the ordinary path and of plain transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.models import fused_attention, fused_layer
from lory.models.attention import document_arguments, documents_apart
from lory.models.fused_body import FusedLayers, fused_layers
from lory.models.fused_memory import Room
from lory.models.kernels import CompiledKernels
from lory.models.varlen import Spans

LENGTHS = torch.tensor([1, 63, 64, 65, 200])
# three queries to a key, and heads that do not add up to the hidden size
ODD = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 256}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    ("Llama", {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    ("Qwen2", {}),
    ("Qwen3", {}),
    ("Mistral", {"sliding_window": None}),
    ("Mistral", {"sliding_window": 7}),
    ("Mistral", {"sliding_window": 70}),
]


def draw(count: int) -> Tensor:
    return torch.randint(3, 131, (1, count), generator=torch.Generator().manual_seed(1))


def prepare(model: Any, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """An adapter on the model in train mode, with values that show; norms that are exact in the model's precision."""
    generator = torch.Generator().manual_seed(2)
    model = model.to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for path, norm in list(model.named_modules()):
        # transformers' own norms compute in fp32 whatever the model's precision is
        if hasattr(norm, "variance_epsilon") and dtype == torch.float64:
            exact = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
            exact.weight = norm.weight
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, exact)
    attach_lora(model, AdapterConfig(**({"rank": 3, "alpha": 5} | settings)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.train()


def fuse(model: Any) -> FusedLayers:
    fused, reason = fused_layers(model)
    assert fused is not None, reason
    return fused


def gradients(model: Any, states: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the states to all that is trained."""
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((states * weight.to(states.dtype)).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def run_ordinarily(model: Any, ids: Tensor, lengths: Tensor = LENGTHS) -> Tensor:
    with documents_apart(model):
        states: Tensor = model.base_model(ids, use_cache=False, **document_arguments(lengths, ids.device))[0]
    return states


def assert_alike(model: Any, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The states, and each gradient relative to its largest element."""
    limit = float(expected.detach().abs().max()) * tolerance
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    ours, theirs = gradients(model, found), gradients(model, expected)
    for name, gradient in theirs.items():
        limit = float(gradient.abs().max()) * tolerance
        assert limit > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=limit, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_states_and_gradients_equal_the_ordinary_path(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    model = prepare(random_model(family, **(ODD | changes)), dtype)
    ids = draw(int(LENGTHS.sum()))
    assert_alike(model, fuse(model)(ids, LENGTHS), run_ordinarily(model, ids), tolerance)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_each_document_equals_plain_transformers_on_it_alone(random_model: Callable[..., Any], family: str) -> None:
    model = prepare(random_model(family, **ODD))
    ids = draw(int(LENGTHS.sum()))
    alone = [model.base_model(part, use_cache=False)[0] for part in ids.split(LENGTHS.tolist(), dim=1)]
    assert_alike(model, fuse(model)(ids, LENGTHS), torch.cat(alone, dim=1), 1e-10)


def test_a_packed_row_equals_padded_rows(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Llama", **ODD))
    ids = draw(int(LENGTHS.sum()))
    rows = [row[0] for row in ids.split(LENGTHS.tolist(), dim=1)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < LENGTHS[:, None]
    states = model.base_model(padded, attention_mask=mask.long(), use_cache=False)[0]
    assert_alike(model, fuse(model)(ids, LENGTHS), states[mask][None], 1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["q_proj", "v_proj"], "rank": 8},
        {"targets": ["o_proj"]},
        {"targets": ["down_proj"]},
        {"targets": ["gate_proj", "k_proj"]},
        {"rank_pattern": {"k_proj": 2, "up_proj": 7}, "alpha_pattern": {"o_proj": 1.5}},
        {"rslora": True},
        {"layers": [1]},
        {"layers": [0], "targets": ["up_proj"]},
    ],
)
def test_any_subset_of_projections_may_be_adapted(random_model: Callable[..., Any], settings: dict[str, Any]) -> None:
    model = prepare(random_model("Llama", **ODD), **settings)
    ids = draw(int(LENGTHS.sum()))
    assert_alike(model, fuse(model)(ids, LENGTHS), run_ordinarily(model, ids), 1e-10)


@pytest.mark.parametrize(
    "settings", [{}, {"targets": ["v_proj"]}, {"targets": ["down_proj", "up_proj"], "layers": [0]}]
)
@pytest.mark.parametrize("tokens", [100, 131, 1000])
def test_the_mlp_may_take_the_tokens_in_parts(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any], settings: dict[str, Any], tokens: int
) -> None:
    monkeypatch.setattr(fused_layer, "PART_TOKENS", tokens)
    model = prepare(random_model("Llama", **ODD), **settings)
    ids = draw(int(LENGTHS.sum()))
    assert_alike(model, fuse(model)(ids, LENGTHS), run_ordinarily(model, ids), 1e-10)


def test_parts_of_a_cpus_mlp_are_of_about_the_same_size() -> None:
    layer = fused_layer.Layer((fused_layer.Projection(torch.ones(1), None, None),) * 7, *[None] * 5)  # type: ignore[arg-type]
    size = fused_layer.PART_TOKENS
    parts = layer.parts(torch.empty(3 * size + 10, 1))
    lengths = [part.stop - part.start for part in parts]
    assert len(parts) == 3
    assert max(lengths) == size + 4
    assert layer.parts(torch.empty(0, 1)) == layer.parts(torch.empty(3 * size, 1, device="meta")) == [slice(None)]


@pytest.mark.parametrize("rank_pattern", [{}, {"q_proj": 2}])
def test_dropout_draws_what_the_ordinary_path_draws(
    random_model: Callable[..., Any], rank_pattern: dict[str, int]
) -> None:
    model = prepare(random_model("Llama", **ODD), dropout=0.3, rank_pattern=rank_pattern)
    ids, fused = draw(int(LENGTHS.sum())), fuse(model)
    torch.manual_seed(7)
    expected = run_ordinarily(model, ids)
    torch.manual_seed(7)
    assert_alike(model, fused(ids, LENGTHS), expected, 1e-10)
    model.eval()
    torch.testing.assert_close(fused(ids, LENGTHS), run_ordinarily(model, ids))


def test_an_embedding_that_is_trained_gets_its_gradient(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Llama", **ODD), targets=["v_proj"])
    model.get_input_embeddings().weight.requires_grad = True
    model.base_model.norm.weight.requires_grad = True
    ids = draw(int(LENGTHS.sum()))
    assert_alike(model, fuse(model)(ids, LENGTHS), run_ordinarily(model, ids), 1e-10)


def test_a_half_precision_base_learns_as_on_the_ordinary_path(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Qwen3", **ODD), torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids = draw(int(LENGTHS.sum()))
    found, expected = fuse(model)(ids, LENGTHS), run_ordinarily(model, ids)
    assert found.dtype == torch.bfloat16
    exact = run_ordinarily(model.double(), ids)
    error, ordinary_error = (((states - exact).norm() / exact.norm()).item() for states in (found, expected))
    assert error < 1.5 * ordinary_error


def test_on_a_gpu_adapters_are_multiplied_in_the_bases_precision(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any]
) -> None:
    model = prepare(random_model("Llama", **ODD), torch.bfloat16)
    ids, fused = draw(int(LENGTHS.sum())), fuse(model)
    found = {}
    for narrow in (False, True):
        monkeypatch.setattr("lory.models.fused_layer._multiplies_narrowly", lambda x, narrow=narrow: narrow)
        found[narrow] = gradients(model, fused(ids, LENGTHS))
    exact = gradients(model.double(), run_ordinarily(model, ids))
    assert {gradient.dtype for gradient in found[True].values()} == {torch.float32}

    def measure_error(gradients: dict[str, Tensor]) -> float:
        errors = [(gradients[name].double() - exact[name]).square().sum() for name in exact]
        return float(sum(errors) / sum(gradient.square().sum() for gradient in exact.values())) ** 0.5

    assert measure_error(found[True]) < 1.5 * measure_error(found[False])


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("some", [True, False], ids=["some wanted", "all wanted"])
def test_what_a_layer_keeps_lies_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, random_model: Callable[..., Any], family: str, some: bool
) -> None:
    monkeypatch.setattr(fused_layer, "PART_TOKENS", 7)
    model = prepare(random_model(family, **ODD), targets=["q_proj", "v_proj", "up_proj", "down_proj"])
    x = torch.randn(33, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 33, 10, dtype=torch.float64)
    wanted = torch.tensor([0, 4, *range(9, 30)]) if some else None
    seen = fused_attention.Seen((0, 13, 33), 0.3)
    z = fused_layer.run_layer(model.base_model.layers[0], x, cos, sin, seen, wanted=wanted)
    given = {tensor.data_ptr() for tensor in (x, cos, sin, *model.parameters())}
    kept = [t for t in z.grad_fn.saved_tensors if t is not None and t.data_ptr() not in given]
    assert len(kept) > 4 + 3 * len(z) // 7
    assert {tensor.untyped_storage().data_ptr() for tensor in (*kept, z)} == {z.untyped_storage().data_ptr()}
    ends = sorted((t.data_ptr(), t.data_ptr() + 8 * t.numel()) for t in (*kept, z) if t.is_contiguous())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    # and hardly more than that is there
    narrow = sum(t.numel() for t in kept if not t.is_contiguous())
    assert z.untyped_storage().nbytes() <= 8 * (sum(t.numel() for t in (*kept, z)) + narrow) + 64 * 8 * len(kept)


def test_a_room_gives_what_it_has() -> None:
    room = Room(torch.empty(1), 3, 50)
    first, second = (room.take(shape, torch.float32) for shape in ((7, 5), (15,)))
    assert first is not None
    assert second is not None
    assert first.shape == (7, 5)
    assert second.data_ptr() - first.data_ptr() == 64 * 4
    assert room.take((32,), torch.bfloat16) is None
    assert room.take((100,), torch.float32) is None
    assert Room(first).take((1,), torch.float32) is None


def test_without_gradients_nothing_is_kept(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Llama", **ODD))
    ids = draw(int(LENGTHS.sum()))
    with torch.no_grad():
        states = fuse(model)(ids, LENGTHS)
    assert states.grad_fn is None
    torch.testing.assert_close(states, run_ordinarily(model, ids).detach())


def test_without_gradients_a_layer_gives_its_output_alone(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Llama", **ODD))
    x, rotation = torch.randn(33, model.config.hidden_size, dtype=torch.float64), torch.randn(2, 33, 10).double()
    arguments = model.base_model.layers[0], x, *rotation, fused_attention.Seen((0, 33), 0.3)
    learning = fused_layer.run_layer(*arguments)
    assert learning.untyped_storage().nbytes() > 4 * 8 * learning.numel()
    with torch.no_grad():
        z = fused_layer.run_layer(*arguments)
    assert z.untyped_storage().nbytes() == 8 * z.numel()
    torch.testing.assert_close(z, learning.detach())


def test_what_is_kept_grows_with_the_tokens_alone(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Llama", **ODD))
    fused = fuse(model)

    def count_kept(length: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            states = fused(draw(length), torch.tensor([length]))
        assert states.requires_grad
        return sum(sizes.values())

    base, once, twice = (count_kept(length) for length in (1, 250, 499))
    # the weights are there whatever the length
    assert twice - once == pytest.approx(once - base, rel=1e-6)


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
def test_blocks_of_any_size_give_dense_attention(
    monkeypatch: pytest.MonkeyPatch, block: int, window: int | None
) -> None:
    monkeypatch.setattr(fused_attention, "BLOCK_TOKENS", block)
    lengths = [1, 4, 5, 70]
    seen = fused_attention.Seen((0, 1, 5, 10, 80), 0.7, window)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(80, heads, 6, generator=generator, dtype=torch.float64).requires_grad_(heads != 5)
        for heads in (6, 2, 2, 6)
    )
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    i, j = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
    visible = (document[i] == document[j]) & (j <= i) & (i - j < (window or 80))
    scores = torch.einsum("ind,jnd->nij", q, k.repeat_interleave(3, 1)) * 0.7
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    expected = torch.einsum("nij,jnd->ind", weights, v.repeat_interleave(3, 1))
    with torch.no_grad():
        torch.testing.assert_close(fused_attention.attend(q, k, v, seen), expected)
        found = fused_attention.attend_back(grad, q, k, v, seen)
    for ours, theirs in zip(found, torch.autograd.grad(expected, [q, k, v], grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("family", "changes"), [("Llama", {}), ("Qwen3", {}), ("Mistral", {"sliding_window": 7})])
@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj"]])
def test_a_devices_own_attention_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
    random_model: Callable[..., Any],
    family: str,
    changes: dict[str, Any],
    targets: Any,
) -> None:
    model = prepare(random_model(family, **(ODD | changes)), targets=targets)
    ids, fused = draw(int(LENGTHS.sum())), fuse(model)
    expected = fused(ids, LENGTHS)

    def place(borders: tuple[int, ...], scaling: float, window: int | None, *_: None) -> fused_attention.Seen:
        return fused_attention.Seen(borders, scaling, window, Spans.of(borders, torch.device("cpu")))

    monkeypatch.setattr("lory.models.fused_body.Seen", place)
    assert_alike(model, fused(ids, LENGTHS), expected, 1e-10)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids, LENGTHS), expected.detach())


def test_compiled_kernels_give_the_same(random_model: Callable[..., Any]) -> None:
    model = prepare(random_model("Qwen3", **ODD))
    ids = draw(int(LENGTHS.sum()))
    eager = CompiledKernels(lambda function: function)
    assert_alike(model, FusedLayers(model, eager)(ids, LENGTHS), fuse(model)(ids, LENGTHS), 1e-10)
