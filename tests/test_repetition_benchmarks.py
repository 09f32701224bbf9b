"""The benchmarks of the guard and of contrastive search: what they plant and count, and the picture of similarity."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import guard, token_similarity
from benchmarks.contrastive import read_prefixes
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_exact_loops_repeat_their_first_copy() -> None:
    ids = guard.plant_loop(random.Random(0), 7, "exact", [1, 2], list(range(100, 200)))
    copy = ids[2:9]
    assert ids == [1, 2] + copy * 69
    assert copy == list(range(copy[0], copy[0] + 7))


@pytest.mark.parametrize("mode", ["changed", "drifting"])
def test_at_most_a_twentieth_of_a_loop_s_tokens_is_changed_in_a_copy(mode: str) -> None:
    shares = []
    for seed in range(40):
        ids = guard.plant_loop(random.Random(seed), 200, mode, [], list(range(1000)))
        copies = [ids[start : start + 200] for start in range(0, len(ids), 200)]
        pairs = [(copies[0], copy) for copy in copies[1:]] if mode == "changed" else itertools.pairwise(copies)
        shares += [sum(a != b for a, b in zip(one, other, strict=True)) / 200 for one, other in pairs]
    # the share is drawn for each loop, evenly from 0 to 5%
    assert sum(shares) / len(shares) == pytest.approx(0.025, abs=0.006)


def test_three_periods_are_never_fewer_than_twelve_tokens() -> None:
    figures = guard.summarize([(1, 12), (1, 13), (10, 30), (10, 31), (10, None)])
    assert figures["within_3"] == pytest.approx(2 / 5)
    assert figures["strictly"] == pytest.approx(1 / 5)
    assert figures["found"] == pytest.approx(4 / 5)


def test_similarity_is_that_of_the_states_before_the_head(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = [5, 6, 7, 5]
    matrix = token_similarity.measure_similarity(model, ids)
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    for i in range(4):
        for j in range(4):
            expected = torch.cosine_similarity(states[i], states[j], dim=0)
            torch.testing.assert_close(matrix[i, j], expected.detach(), atol=1e-5, rtol=0)


def test_the_mean_leaves_out_each_token_s_likeness_to_itself() -> None:
    assert token_similarity.mean_similarity(torch.tensor([[1.0, 0.2], [0.2, 1.0]])) == pytest.approx(0.2)


def test_the_picture_shows_each_model(
    tiny_model: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, picture = tmp_path / "text.txt", tmp_path / "similarity.png"
    text.write_text("The quick brown fox jumps over the lazy dog, and the capital of France is Paris. " * 40)
    models = [str(tiny_model), str(tiny_adapter)]
    arguments = [*models, "--names", "base", "adapted", "--data", str(text), "--tokens", "12", "--texts", "2"]
    monkeypatch.setattr(sys, "argv", ["token_similarity", *arguments, "--output", str(picture)])
    token_similarity.main()
    told = capsys.readouterr().out
    assert "base: mean similarity" in told
    assert "adapted: mean similarity" in told
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 100_000


def test_prefixes_begin_with_whole_words_in_equal_stretches(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number:04d}" for number in range(2000)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prefixes = read_prefixes(text, 4, tokenizer, tokens=9)
    assert prefixes.shape == (4, 9)
    assert [tokenizer.decode(row)[:8] for row in prefixes] == ["word0001", "word0500", "word1000", "word1500"]
