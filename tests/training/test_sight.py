"""Images in training: packed as unpacked, cached as encoded, and each document with the model's own positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vision_models import FAMILIES, draw

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.assistant import Assistant, load
from lory.data.encoding.encode import Encoder
from lory.data.mixture.collate import collate
from lory.runtime import LoryError, UsageError
from lory.training.features import FeatureCache
from lory.training.objective import Objective
from lory.training.sight import Sight, open_sight
from lory.training.step import attention_for
from lory.types import Conversation, Media, Message, Sample

VisionModel = Callable[[str], Path]


def samples_of(assistant: Assistant, folder: Path) -> list[Sample]:
    """Documents with one image, two, none, and one again, of uneven lengths."""
    encoder = Encoder(assistant.tokenizer, assistant.terminators, 2000, reader=assistant.reader)
    encoder.rules = type(encoder.rules)(roots=(folder,))
    texts = [("<image>What is it?", [1]), ("<image> or <image>?", [2, 3]), ("No image", []), ("And this: <image>", [4])]
    samples: list[Sample] = []
    for text, numbers in texts:
        for number in numbers:
            draw(number, 12 + 8 * number, 20).save(folder / f"{number}.png")
        media = tuple(Media("image", str(folder / f"{number}.png")) for number in numbers)
        messages = (Message("user", text, media), Message("assistant", "A picture." * (len(numbers) + 1)))
        samples += encoder.encode(Conversation(messages)).samples
    return samples


def learn(objective: Objective, batches: Sequence[Any]) -> tuple[float, torch.Tensor]:
    """The mean loss over batches, and the gradients of all that is trained."""
    model = objective.model
    model.zero_grad()
    weight, total = sum(batch.weight for batch in batches), 0.0
    for batch in batches:
        with attention_for(model, batch):
            loss = objective(batch).loss / weight
            loss.backward()
        total += loss.item()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return total, torch.cat(gradients)


def start(family: str, vision_model: VisionModel, adapter: AdapterConfig | None = None) -> Assistant:
    assistant = load(vision_model(family), device="cpu")
    torch.manual_seed(0)
    attach_lora(assistant.model, adapter or AdapterConfig(rank=2))
    for name, parameter in assistant.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return assistant


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_packed_padded_alone_and_cached(
    family: str, vision_model: VisionModel, tmp_path: Path
) -> None:
    assistant = start(family, vision_model)
    samples = samples_of(assistant, tmp_path)
    assert assistant.reader is not None
    sight = Sight(assistant.model, assistant.reader, None)
    objective = Objective(assistant.model, sight=sight)
    alone = learn(objective, [collate([sample], padded=True) for sample in samples])
    ways = {"packed": [collate(samples)], "padded": [collate(samples, padded=True)]}
    for way in ways.values():
        found = learn(objective, way)
        assert found[0] == pytest.approx(alone[0], rel=1e-5)
        torch.testing.assert_close(found[1], alone[1], rtol=1e-3, atol=2e-5)

    sight.cache = FeatureCache(f"test-{family}", 10**9)
    assert sight.is_frozen
    for misses in (4, 4):
        found = learn(objective, ways["packed"])
        assert sight.cache.misses == misses
        assert found[0] == pytest.approx(alone[0], rel=1e-5)
        torch.testing.assert_close(found[1], alone[1], rtol=1e-3, atol=2e-5)
    assert sight.speed_up(collate(samples[1:2]))
    sight.close()


def test_a_packed_document_has_the_positions_that_it_has_alone(vision_model: VisionModel, tmp_path: Path) -> None:
    assistant = load(vision_model("qwen2_vl"), device="cpu")
    samples = samples_of(assistant, tmp_path)
    assert assistant.reader is not None
    sight = Sight(assistant.model, assistant.reader, None)
    documents = [torch.tensor(sample.input_ids) for sample in samples]
    expected, grids = [], []
    for sample in samples:
        pixels = sight.load(collate([sample])).pixels or {}
        grids.append(pixels.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long)))
        kinds = assistant.reader.kinds(sample.input_ids)
        expected.append(
            assistant.model.model.get_rope_index(torch.tensor([sample.input_ids]), image_grid_thw=grids[-1], **kinds)[
                0
            ][:, 0]
        )
    found = sight.vision.positions(documents, grids)
    assert found is not None
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1))
    assert found[1].max() < len(documents[1]) - 1  # an image's tokens share positions


def test_a_second_run_finds_what_the_first_encoded(
    vision_model: VisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORY_CACHE", str(tmp_path / "cache"))
    assistant = start("qwen2_vl", vision_model)
    samples = samples_of(assistant, tmp_path)
    assert assistant.reader is not None
    losses = []
    for misses in (4, 0):
        sight = open_sight(assistant.model, assistant.reader, cache_gb=1)
        losses.append(learn(Objective(assistant.model, sight=sight), [collate(samples)])[0])
        assert sight.cache is not None
        assert sight.cache.misses == misses
        sight.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_full_cache_encodes_the_rest_anew(
    vision_model: VisionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assistant = start("llava", vision_model)
    samples = samples_of(assistant, tmp_path)
    assert assistant.reader is not None
    sight = Sight(assistant.model, assistant.reader, FeatureCache("small", 4000))
    objective = Objective(assistant.model, sight=sight)
    losses = [learn(objective, [collate(samples)])[0] for _ in range(2)]
    assert "which is the limit" in caplog.text
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    sight.close()


def test_a_cache_that_nothing_was_added_to_leaves_no_files() -> None:
    cache = FeatureCache("idle", 4000)
    assert len(list(cache.folder.iterdir())) == 2
    cache.close()
    cache.close()
    assert not list(cache.folder.iterdir())


@pytest.mark.parametrize(
    ("adapter", "parts"),
    [
        (AdapterConfig(rank=2), {"language"}),
        (AdapterConfig(rank=2, freeze_vision=False), {"language", "vision"}),
        (AdapterConfig(rank=2, freeze_projector=False), {"language", "projector"}),
        (AdapterConfig(rank=2, targets=r".*visual\.blocks.*(qkv|proj)"), {"vision"}),
    ],
)
def test_adapters_go_on_the_parts_that_are_asked_for(
    adapter: AdapterConfig, parts: set[str], vision_model: VisionModel, tmp_path: Path
) -> None:
    assistant = start("qwen2_vl", vision_model, adapter)
    samples = samples_of(assistant, tmp_path)
    assert assistant.reader is not None
    sight = open_sight(assistant.model, assistant.reader, cache_gb=1)
    assert (sight.cache is None) == bool(parts & {"vision", "projector"})
    learn(Objective(assistant.model, sight=sight), [collate(samples)])
    learnt = {name for name, p in assistant.model.named_parameters() if p.grad is not None and p.grad.any()}
    found = {"projector" if "merger" in name else "vision" if "visual" in name else "language" for name in learnt}
    assert found == parts
    sight.close()


def test_an_image_that_changes_while_a_run_goes_on_stops_it(vision_model: VisionModel, tmp_path: Path) -> None:
    assistant = start("qwen2_vl", vision_model)
    samples = samples_of(assistant, tmp_path)
    assert assistant.reader is not None
    sight = Sight(assistant.model, assistant.reader, None)
    draw(99, 20, 20).save(tmp_path / "1.png")
    with pytest.raises(LoryError, match=r"1\.png has changed since"):
        sight.load(collate(samples[:1]))


def test_what_is_not_known_to_be_right_is_refused(tiny_model: Path, vision_model: VisionModel) -> None:
    gemma = load(vision_model("gemma3"), device="cpu")
    assert gemma.reader is not None
    with pytest.raises(UsageError, match="lets the tokens of an image see each other"):
        Sight(gemma.model, gemma.reader, None)
    reader = load(vision_model("qwen2_vl"), device="cpu").reader
    assert reader is not None
    with pytest.raises(UsageError, match="does not take its tower's output"):
        Sight(load(tiny_model, device="cpu").model, reader, None)
