"""Contrastive search gives the tokens of equation 5 written out word for word, however the candidates are computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation import BaseStreamer

import lory
from lory.adapters.encoders import PromptConfig
from lory.adapters.prompt import attach, prompt_inputs
from lory.decoding import contrastive_search as module
from lory.decoding.contrastive_search import contrastive_search
from lory.runtime import UsageError

Model = Callable[..., Any]


@torch.no_grad()
def search_literally(model: Any, prompt: list[int], tokens: int, alpha: float, k: int) -> list[int]:
    """Equation 5 of arXiv 2202.06417, without a cache: each candidate is appended and the whole text is run."""
    ids = list(prompt)
    for _ in range(tokens):
        probabilities = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().softmax(dim=-1)
        candidates = probabilities.topk(k).indices.tolist()
        texts = torch.tensor([[*ids, candidate] for candidate in candidates])
        states = model(texts, use_cache=False, output_hidden_states=True).hidden_states[-1].float()
        best = None
        for candidate, hidden in zip(candidates, states, strict=True):
            penalty = max(torch.cosine_similarity(hidden[-1], hidden[j], dim=0).item() for j in range(len(ids)))
            value = (1 - alpha) * probabilities[candidate].item() - alpha * penalty
            if best is None or value > best[0]:
                best = (value, candidate)
        assert best is not None
        ids.append(best[1])
    return ids


def run(model: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """Contrastive search over prompts padded on the left with 0; the padding is taken off again."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    output = model.generate(ids, attention_mask=mask, custom_generate=contrastive_search, **settings | options)
    return [row[longest - len(prompt) :] for row, prompt in zip(output.tolist(), prompts, strict=True)]


PROMPTS = [[5, 17, 9, 22, 31, 8], [40, 41, 7], [3, 60, 12, 9, 77]]


@pytest.mark.parametrize(
    ("family", "changes", "shares"),
    [
        ("Llama", {}, True),
        ("Qwen2", {}, True),
        ("GPT2", {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 64}, True),
        # its place in the cache, not its position id, says how far a token is away
        ("Bloom", {"n_head": 4, "n_layer": 2, "hidden_size": 24}, False),
        # some layers see four tokens back
        ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 6}, False),
        # keeps a state in place of keys and values
        ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, False),
    ],
)
def test_the_tokens_are_those_of_the_equation(
    random_model: Model, family: str, changes: dict[str, Any], shares: bool
) -> None:
    model = random_model(family, **changes)
    expected = [search_literally(model, prompt, 10, 0.6, 4) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        assert run(model, [prompt], 10, penalty_alpha=0.6, top_k=4) == [answer]
    assert module._SHARES.get(model, {}).get(model.config._attn_implementation, False) is shares


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_padded_batch_are_as_alone(random_model: Model, attention: str) -> None:
    model = random_model("Llama")
    model.set_attn_implementation(attention)
    expected = [search_literally(model, prompt, 10, 0.5, 5) for prompt in PROMPTS]
    assert run(model, PROMPTS, 10, penalty_alpha=0.5, top_k=5) == expected
    assert module._SHARES[model][attention]


def test_a_copied_cache_gives_the_same_batch(random_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("Llama")
    shared = run(model, PROMPTS, 10, penalty_alpha=0.5, top_k=5)
    monkeypatch.setattr(module, "_can_share", lambda _: False)
    assert run(model, PROMPTS, 10, penalty_alpha=0.5, top_k=5) == shared


def test_alpha_zero_and_one_candidate_are_greedy(random_model: Model) -> None:
    model = random_model("Llama")
    prompt = torch.tensor(PROMPTS[:1])
    greedy = model.generate(prompt, max_new_tokens=10, eos_token_id=None, pad_token_id=0, do_sample=False).tolist()
    assert run(model, PROMPTS[:1], 10, penalty_alpha=0.0, top_k=5) == greedy
    assert run(model, PROMPTS[:1], 10, penalty_alpha=0.9, top_k=1) == greedy


def test_options_may_come_from_the_generation_config(random_model: Model) -> None:
    model = random_model("Llama")
    given = run(model, PROMPTS, 8, penalty_alpha=0.3, top_k=3)
    model.generation_config.penalty_alpha, model.generation_config.top_k = 0.3, 3
    assert run(model, PROMPTS, 8) == given


def test_a_row_ends_at_its_terminator_and_is_filled_up(random_model: Model) -> None:
    model = random_model("Llama")
    free = run(model, PROMPTS, 10, penalty_alpha=0.6, top_k=4)
    end = free[0][len(PROMPTS[0]) + 3]
    ended = run(model, PROMPTS, 10, penalty_alpha=0.6, top_k=4, eos_token_id=end)
    stop = free[0].index(end, len(PROMPTS[0])) + 1
    assert ended[0][:stop] == free[0][:stop]
    assert set(ended[0][stop:]) <= {0}


def test_processors_stopping_and_streaming_work_as_in_generate(random_model: Model) -> None:
    model = random_model("Llama")
    plain = run(model, PROMPTS[:1], 10, penalty_alpha=0.6, top_k=4)[0][len(PROMPTS[0]) :]

    class Streamer(BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012
        ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens.extend(value.tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    search = functools.partial(contrastive_search, streamer=streamer)
    prompt = torch.tensor(PROMPTS[:1])
    settings = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, "penalty_alpha": 0.6, "top_k": 4}
    model.generate(prompt, custom_generate=search, **settings)
    assert streamer.tokens == plain
    assert streamer.ended
    banned = model.generate(prompt, custom_generate=contrastive_search, suppress_tokens=[plain[0]], **settings)
    assert plain[0] not in banned[0, len(PROMPTS[0]) :].tolist()


def test_a_cache_that_was_begun_and_embeddings_go_on_alike(random_model: Model) -> None:
    model = random_model("Llama")
    prompt = torch.tensor(PROMPTS[:1])
    expected = run(model, PROMPTS[:1], 8, penalty_alpha=0.6, top_k=4)
    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "penalty_alpha": 0.6, "top_k": 4}
    embeds = model.get_input_embeddings()(prompt)
    output = model.generate(prompt, inputs_embeds=embeds, custom_generate=contrastive_search, **settings)
    assert output.tolist() == expected
    cache = DynamicCache(config=model.config)
    output = model.generate(prompt, past_key_values=cache, custom_generate=contrastive_search, **settings)
    assert output.tolist() == expected
    # the last token that was chosen is in the cache, too
    assert cache.get_seq_length() == prompt.shape[1] + 8


def test_an_adapter_s_model_follows_the_equation(tiny_adapter: Path) -> None:
    model = lory.load(tiny_adapter).model
    assert run(model, PROMPTS[:1], 8, penalty_alpha=0.6, top_k=4) == [search_literally(model, PROMPTS[0], 8, 0.6, 4)]


def test_a_quantized_model_gives_the_same_either_way(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    model = lory.load(tiny_model, quantize="nf4").model
    shared = run(model, PROMPTS, 8, penalty_alpha=0.6, top_k=4)
    assert module._SHARES[model]["sdpa"]
    monkeypatch.setattr(module, "_can_share", lambda _: False)
    assert run(model, PROMPTS, 8, penalty_alpha=0.6, top_k=4) == shared


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_soft_prompts_are_seen_either_way(
    random_model: Model, monkeypatch: pytest.MonkeyPatch, kind: Literal["prompt", "prefix"]
) -> None:
    model = random_model("Llama")
    attach(model, PromptConfig(type=kind, virtual_tokens=3, init="random"))
    ids = torch.tensor(PROMPTS[:1])
    settings = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}

    def search(alpha: float) -> list[list[int]]:
        options = {"penalty_alpha": alpha, "top_k": 4, "custom_generate": contrastive_search}
        with torch.no_grad():
            output: list[list[int]] = model.generate(**prompt_inputs(model, ids), **settings, **options).tolist()
        return output

    with torch.no_grad():
        assert search(0.0) == model.generate(**prompt_inputs(model, ids), **settings).tolist()
    shared = search(0.6)
    assert module._SHARES[model]["sdpa"]
    monkeypatch.setattr(module, "_can_share", lambda _: False)
    assert search(0.6) == shared


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"penalty_alpha": 1.5}, "penalty_alpha = 1.5"),
        ({"penalty_alpha": 0.6, "top_k": 0}, "top_k = 0"),
        ({"use_cache": False}, "keeps a cache"),
    ],
)
def test_what_cannot_be_is_refused(random_model: Model, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        run(random_model("Llama"), PROMPTS[:1], 2, **options)


def test_no_hook_stays_behind(random_model: Model) -> None:
    model = random_model("Llama")
    run(model, PROMPTS[:1], 2)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_the_real_model_follows_the_equation(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(smollm2)("The city of Vienna is known for")["input_ids"]
    assert run(model, [prompt], 6, penalty_alpha=0.6, top_k=4) == [search_literally(model, prompt, 6, 0.6, 4)]
    by_default = search_literally(model, prompt, 4, module.PENALTY_ALPHA, module.TOP_K)
    assert run(model, [prompt], 4) == [by_default]
