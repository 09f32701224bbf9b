"""The benchmarks of the guard and of contrastive search: what they plant and count, and the picture of similarity."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import continuations, guard, token_similarity
from benchmarks.contrastive import read_prefixes
from transformers import AutoModelForCausalLM, AutoTokenizer

from lory.assistant import load
from lory.data.sources.config import SourceConfig
from lory.evaluate.run import Settings, evaluate


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


def test_three_periods_are_told_with_and_without_a_least_number_of_tokens() -> None:
    figures = guard.summarize([(1, 12), (1, 13), (10, 30), (10, 31), (10, None)])
    assert figures["within_3"] == pytest.approx(1 / 5)
    assert figures["within_3_or_12"] == pytest.approx(2 / 5)
    assert figures["within_3_or_32"] == pytest.approx(4 / 5)
    assert figures["found"] == pytest.approx(4 / 5)


def test_half_of_the_periods_have_fewer_than_fifteen_tokens_where_each_doubling_is_as_likely() -> None:
    draw = random.Random(0)
    for spread, share in (("even", 0.07), ("log", 0.5)):
        periods = [guard.draw_period(draw, spread) for _ in range(2000)]
        assert sum(period < 15 for period in periods) / 2000 == pytest.approx(share, abs=0.03)
        assert min(periods) == 1
        assert 195 < max(periods) <= 200


def test_words_are_told_from_signs() -> None:
    assert guard.is_wordy(" the harbour lay quiet, and so")
    assert guard.is_wordy("我是你的助手，很高兴能回答你的问题")
    for signs in ("| a | 1 | 2 |", " 1957.", "x = f(y)[0]", " ", ""):
        assert not guard.is_wordy(signs), signs


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


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A file of two texts, whose prefixes of 5 tokens are continued by 12."""
    monkeypatch.setattr(continuations, "PREFIX", 5)
    monkeypatch.setattr(continuations, "CONTINUATION", 12)
    monkeypatch.setattr(continuations, "BATCH", 2)
    text = tmp_path / "text.txt"
    animals = ("fox", "wolf")
    text.write_text(
        "\n".join(f"The quick brown {animal} jumps over the lazy dog, and so on. " * 9 for animal in animals)
    )
    return str(text)


def test_greedy_continuations_score_as_in_an_evaluation(tiny_model: Path, short: str) -> None:
    assistant = load(tiny_model)
    questions = continuations.find_prefixes(assistant, short, 1000)
    scores = continuations.score(continuations.continue_prefixes(assistant, questions, "greedy"))
    settings = Settings(continuation=(5, 12))
    measured = evaluate(assistant, [SourceConfig(path=short)], settings).total["continuations"]["repetition"]
    assert scores == pytest.approx({name: measured[name] for name in scores})


@pytest.mark.parametrize("method", [*continuations.OWN, *continuations.THROUGH_GENERATE])
def test_every_method_gives_continuations_of_full_length(method: str, tiny_model: Path, short: str) -> None:
    assistant = load(tiny_model)
    found = continuations.continue_prefixes(assistant, continuations.find_prefixes(assistant, short, 3), method)
    assert [len(ids) for ids in found] == [12, 12, 12]
    if method == "no-repeat":
        assert continuations.score(found)["seq_rep_4"] == 0
