"""The lean forward: the same numbers as the model's own, weights held once, and given up when the model changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.adapters.prompt import PromptConfig, attach
from lory.decoding.contrastive_search import contrastive_steps
from lory.decoding.loop import decode_steps
from lory.generate import GenerationOptions, generate_batch
from lory.models.lean import LeanDecoder, find_decoder, prepare_for_decoding

FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied Llama": ("Llama", {"tie_word_embeddings": True}),
    "Llama with long rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {"hidden_size": 24, "num_attention_heads": 4}),
    "Qwen3": ("Qwen3", {}),
    "one key for all": ("Llama", {"num_key_value_heads": 1}),
    "a key for each": ("Llama", {"num_key_value_heads": 4}),
}
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make(random_model: Callable[..., Any], name: str) -> Any:
    family, changes = FAMILY[name]
    model = random_model(family, **changes)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms start as zeros and ones, which would hide their being left out
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def padded(*prompts: list[int]) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    rows = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


ONE, SEVERAL = padded([1, 7, 50, 9, 33]), padded([5], [1, 7, 50, 9, 33], [1, 3, 9, 27, 81, 12, 36, 108])


def decode(model: Any, given: dict[str, torch.Tensor]) -> tuple[list[list[int | None]], torch.Tensor]:
    """Tokens step by step, and their log-probabilities."""
    steps = list(decode_steps(model, given, GREEDY, logprobs=0, forward=find_decoder(model)))
    return [step.tokens for step in steps], torch.stack([step.logprobs for step in steps if step.logprobs is not None])


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("given", [ONE, SEVERAL], ids=["one", "several"])
def test_tokens_and_logprobs_are_the_models_own(
    random_model: Callable[..., Any], name: str, given: dict[str, torch.Tensor]
) -> None:
    model = make(random_model, name)
    tokens, logprobs = decode(model, given)
    assert prepare_for_decoding(model).startswith("decoding: lean forward")
    assert find_decoder(model) is not None
    lean_tokens, lean_logprobs = decode(model, given)
    assert lean_tokens == tokens
    torch.testing.assert_close(lean_logprobs, logprobs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["Llama with biases", "tied Llama", "Qwen3"])
def test_the_model_keeps_its_values_and_its_own_forward(random_model: Callable[..., Any], name: str) -> None:
    model = make(random_model, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**SEVERAL).logits
        prepare_for_decoding(model)
        torch.testing.assert_close(model(**SEVERAL).logits, logits, atol=2e-5, rtol=0)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)


def test_the_choice_of_products_is_put_back(random_model: Callable[..., Any]) -> None:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    model = random_model("Llama")
    try:
        settings.fp32_precision = "bf16"
        with torch.inference_mode():  # which what is prepared here must outlive
            prepare_for_decoding(model)
        steps = decode_steps(model, ONE, GREEDY, forward=find_decoder(model))
        next(steps), next(steps)
        assert settings.fp32_precision == "bf16"
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("int8", [False, True])
def test_no_weight_is_held_twice(random_model: Callable[..., Any], int8: bool) -> None:
    model = random_model("Llama", tie_word_embeddings=True)
    prepare_for_decoding(model, int8)
    attention = model.model.layers[0].self_attn
    joined = find_decoder(model).layers[0].qkv.weight  # type: ignore[union-attr]
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert {part.untyped_storage().data_ptr() for part in parts} == {joined.untyped_storage().data_ptr()}
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_prompt_may_come_in_parts(random_model: Callable[..., Any]) -> None:
    from transformers import DynamicCache

    model = make(random_model, "Qwen3")
    ids = torch.tensor([[1, 7, 50, 9, 33, 2, 8], [3, 4, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        prepare_for_decoding(model)
        decoder, cache = find_decoder(model), DynamicCache(config=model.config)
        assert decoder is not None
        for part in ids.split([3, 3, 1], dim=1):
            output = decoder(part, past_key_values=cache)
    torch.testing.assert_close(output.logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_in_and_stays_apart(random_model: Callable[..., Any], dora: bool) -> None:
    model = random_model("Llama")
    attach_lora(model, AdapterConfig(rank=3, type="dora" if dora else "lora"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    tokens, logprobs = decode(model, SEVERAL)
    prepare_for_decoding(model)
    assert find_decoder(model) is not None
    lean_tokens, lean_logprobs = decode(model, SEVERAL)
    assert lean_tokens == tokens
    torch.testing.assert_close(lean_logprobs, logprobs, atol=2e-5, rtol=0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_soft_prompt_stays_in_force(random_model: Callable[..., Any], kind: str) -> None:
    model = random_model("Llama")
    attach(model, PromptConfig(type=kind, virtual_tokens=3))
    model.eval()
    options, prompts = GenerationOptions(max_new_tokens=15), [[1, 7, 50, 9, 33], [5, 6]]
    expected = generate_batch(model, prompts, options, (131,))
    prepare_for_decoding(model)
    assert find_decoder(model) is not None
    assert generate_batch(model, prompts, options, (131,)) == expected
    assert generate_batch(random_model("Llama"), prompts, options, (131,)) != expected


def test_other_precisions_keep_the_models_own_forward(random_model: Callable[..., Any]) -> None:
    model = random_model("Llama").to(torch.bfloat16)
    assert "not in float32" in prepare_for_decoding(model)
    assert find_decoder(model) is None


def test_a_changed_model_is_decoded_by_its_own_forward(random_model: Callable[..., Any]) -> None:
    def change_weight(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.5)

    def put_adapter(model: Any) -> None:
        attach_lora(model, AdapterConfig(rank=3))
        model.eval()

    for change in (change_weight, put_adapter, lambda model: model.double(), lambda model: model.train()):
        model = random_model("Llama")
        prepare_for_decoding(model)
        assert find_decoder(model) is not None
        change(model)
        assert find_decoder(model) is None


def test_int8_goes_through_the_lean_forward_and_the_models_own_alike(random_model: Callable[..., Any]) -> None:
    model = make(random_model, "Qwen2")
    with torch.no_grad():
        before = model(**SEVERAL).logits[:, -1]
        assert prepare_for_decoding(model, int8=True) == "decoding: lean forward, 16 layers in int8"
        own = model(**SEVERAL).logits[:, -1]
    _, logprobs = decode(model, SEVERAL)
    torch.testing.assert_close(own.log_softmax(-1).amax(-1), logprobs[0], atol=0.05, rtol=0)
    assert (own - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Mistral", {"sliding_window": 8}, "window only"),
        ("Gemma2", {}, "Gemma2ForCausalLM is none of"),
        ("GPTNeoX", {"num_key_value_heads": 4}, "GPTNeoXForCausalLM is none of"),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_other_models_keep_their_own_forward(
    random_model: Callable[..., Any], family: str, changes: dict[str, Any], reason: str, int8: bool
) -> None:
    model = random_model(family, **changes)
    with torch.no_grad():
        before = model(**SEVERAL).logits[:, -1]
        done = prepare_for_decoding(model, int8)
        after = model(**SEVERAL).logits[:, -1]
    assert reason in done
    assert ("layers in int8" if int8 else "weights transposed") in done
    assert find_decoder(model) is None
    assert (after - before).norm() < (0.05 if int8 else 1e-5) * before.norm()


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "one key for all"])
@pytest.mark.parametrize("given", [ONE, SEVERAL], ids=["one", "several"])
def test_contrastive_search_finds_the_same_through_it(
    random_model: Callable[..., Any], name: str, given: dict[str, torch.Tensor]
) -> None:
    model = make(random_model, name)

    def search() -> list[list[int | None]]:
        steps = contrastive_steps(model, given, GREEDY, 0.6, 5, find_decoder(model))
        return [step.tokens for step in steps]

    own = search()
    assert prepare_for_decoding(model).startswith("decoding: lean forward")
    with pytest.MonkeyPatch.context() as patched:
        # the model's own forward is for the prompt alone
        patched.setattr(type(find_decoder(model)), "run_body", counted := Counted(LeanDecoder.run_body))
        assert search() == own
    assert counted.times >= GREEDY["max_new_tokens"] - 1


class Counted:
    """A method that counts its calls."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.times = method, 0

    def __get__(self, instance: Any, _: type) -> Callable[..., Any]:
        self.times += 1
        return self.method.__get__(instance)  # type: ignore[no-any-return]
