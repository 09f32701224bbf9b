"""Text from tokens: pieces that join to the whole, options that mean what transformers means, streams that stop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_circling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lory.decoding.contrastive_search import contrastive_search
from lory.generate import (
    Ending,
    GenerationOptions,
    decode_pieces,
    decode_text,
    default_options,
    generate_batch,
    generate_ids,
    generation_arguments,
    stream_ids,
    stream_steps,
    stream_text,
)
from lory.runtime import LoryError, UsageError

PROMPT = [1, 7, 50, 9, 33]
TERMINATORS = (2,)
TEXT = "Hello, world!\n  Two spaces,\n\n世界 🦜🏽 naïve ends."


@pytest.fixture(scope="module")
def llama(random_model: Callable[..., Any]) -> Any:
    return random_model("Llama")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def metaspace() -> Any:
    """A tokenizer of SentencePiece's kind, which drops the first space of whatever it decodes."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"])
    inner.train_from_iterator(["the cat\n sat on\n the mat", TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


@contextlib.contextmanager
def listen_to(name: str) -> Iterator[list[str]]:
    """What a logger that does not propagate says meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    yield said
    logging.getLogger(name).removeHandler(handler)


def generate(model: Any, **arguments: Any) -> list[int]:
    """transformers' own answer, without the prompt."""
    prompt = torch.tensor([PROMPT])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **arguments)
    return output[0, len(PROMPT) :].tolist()


# Pieces of text


@pytest.mark.parametrize("text", [TEXT, "the cat\n sat on\n the mat", " leading and trailing ", "", "🦜"])
@pytest.mark.parametrize("kind", ["tokenizer", "metaspace"])
def test_pieces_joined_are_the_whole_text(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    chosen = request.getfixturevalue(kind)
    ids = chosen(text, add_special_tokens=False)["input_ids"]
    assert "".join(decode_pieces(chosen, ids)) == decode_text(chosen, ids)


def test_pieces_of_random_bytes_joined_are_the_whole_text(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for length in [1, 2, 3, 17, 101] * 20:
        ids = torch.randint(0, len(tokenizer), (length,), generator=generator).tolist()
        assert "".join(decode_pieces(tokenizer, ids)) == decode_text(tokenizer, ids)


def test_a_piece_comes_as_soon_as_its_character_is_whole(tokenizer: Any) -> None:
    ids = tokenizer("a🦜b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6  # the parrot takes four bytes
    read = 0

    def tokens() -> Iterator[int]:
        nonlocal read
        for read, token in enumerate(ids, 1):  # noqa: B007 - read by the assertion
            yield token

    assert [(piece, read) for piece in decode_pieces(tokenizer, tokens())] == [("a", 1), ("🦜", 5), ("b", 6)]


def test_marks_are_left_out_and_spaces_before_punctuation_kept(tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>Well , yes .<|im_end|>", add_special_tokens=False)["input_ids"]
    cleaning = AutoTokenizer.from_pretrained(
        tokenizer.name_or_path,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )
    assert cleaning.decode(ids) != decode_text(cleaning, ids)
    assert decode_text(cleaning, ids) == "Well , yes ."


# Options


def test_greedy_ids_are_those_of_transformers(llama: Any) -> None:
    expected = generate(llama, max_new_tokens=23, do_sample=False, eos_token_id=131)
    assert generate_ids(llama, PROMPT, GenerationOptions(max_new_tokens=23), (131,)) == expected
    assert len(expected) == 23


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 0.7, "top_k": 7},
        {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.8},
        {"do_sample": True, "top_k": 0, "min_p": 0.05},
        {"do_sample": True, "top_k": 0, "typical_p": 0.5},
    ],
)
def test_each_option_means_what_it_means_to_transformers(llama: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    expected = generate(llama, max_new_tokens=11, eos_token_id=131, **{"do_sample": False, **options})
    assert generate_ids(llama, PROMPT, GenerationOptions(max_new_tokens=11, seed=5, **options), (131,)) == expected
    assert expected != generate(llama, max_new_tokens=11, eos_token_id=131, do_sample=False)


def test_the_answer_ends_at_the_first_terminator_and_does_not_contain_it(llama: Any) -> None:
    whole = generate_ids(llama, PROMPT, GenerationOptions(max_new_tokens=9, no_repeat_ngram_size=1), (131,))
    options = GenerationOptions(max_new_tokens=9, no_repeat_ngram_size=1)
    assert generate_ids(llama, PROMPT, options, (130, whole[4])) == whole[:4]


def test_a_sampled_answer_repeats_with_its_seed_only(llama: Any) -> None:
    def draw(seed: int | None) -> list[int]:
        return generate_ids(llama, PROMPT, GenerationOptions(max_new_tokens=15, do_sample=True, seed=seed), (131,))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_an_answer_ends_with_the_context(llama: Any) -> None:
    prompt = [1] + [9] * 59  # of 64
    assert len(generate_ids(llama, prompt, GenerationOptions(max_new_tokens=500), (131,))) == 4
    assert len(generate_ids(llama, prompt, GenerationOptions(max_new_tokens=3), (131,))) == 3


@pytest.mark.parametrize("length", [64, 65])
def test_a_prompt_that_fills_the_context_is_refused(llama: Any, length: int) -> None:
    with pytest.raises(UsageError, match=rf"has {length} tokens, but the model's context ends at 64"):
        generation_arguments(llama, length, GenerationOptions(), TERMINATORS)


def test_the_models_own_options_are_taken_from_its_generation_config(random_model: Callable[..., Any]) -> None:
    model = random_model("Llama")
    assert default_options(model) == GenerationOptions()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_k=5, max_new_tokens=33)
    assert default_options(model) == GenerationOptions(do_sample=True, temperature=0.6, top_k=5, max_new_tokens=33)


def test_given_options_win_over_the_models_own(random_model: Callable[..., Any], llama: Any) -> None:
    greedy = GenerationOptions(max_new_tokens=11)
    expected = generate_ids(llama, PROMPT, greedy, (131,))
    model = random_model("Llama")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=3, repetition_penalty=1.9, no_repeat_ngram_size=1, num_beams=3
    )
    model.generation_config.max_length = 7
    with listen_to("transformers") as warnings:
        assert generate_ids(model, PROMPT, greedy, (131,)) == expected
    assert warnings == []


def test_an_impossible_value_in_a_generation_config_is_named(random_model: Callable[..., Any]) -> None:
    model = random_model("Llama")
    model.generation_config = GenerationConfig(temperature=0.0)
    with pytest.raises(UsageError, match=r"generation_config\.json of .*'temperature' was given 0\.0"):
        default_options(model)


# Beam search


@pytest.mark.parametrize("options", [{}, {"length_penalty": -3.0}, {"repetition_penalty": 1.5}])
def test_beams_are_transformers(llama: Any, options: dict[str, Any]) -> None:
    # which token ends answers is chosen so that some do end
    ends = [generate_ids(llama, PROMPT, GenerationOptions(max_new_tokens=6, num_beams=3), (131,))[3]]
    ours = GenerationOptions(max_new_tokens=14, num_beams=3, **options)
    expected = generate(llama, max_new_tokens=14, num_beams=3, do_sample=False, eos_token_id=ends, **options)
    steps = list(stream_steps(llama, [PROMPT], ours, ends))
    kept = expected[: expected.index(ends[0]) + 1] if ends[0] in expected else expected
    assert [step.tokens for step in steps] == [[token] for token in kept]
    assert [step.finished for step in steps] == [False] * (len(kept) - 1) + [True]


def test_beams_of_a_batch_are_those_of_each_prompt(llama: Any) -> None:
    options, prompts = GenerationOptions(max_new_tokens=9, num_beams=4), [PROMPT, PROMPT[2:], [5, 6, 8, 9, 10, 11, 12]]
    ends = [generate_ids(llama, PROMPT, options, (131,))[4]]
    alone = [generate_ids(llama, prompt, options, ends) for prompt in prompts]
    assert generate_batch(llama, prompts, options, ends) == alone
    assert len({len(answer) for answer in alone}) > 1


def test_several_beams_find_what_is_likelier(llama: Any) -> None:
    def score(ids: list[int]) -> float:
        with torch.no_grad():
            log_probs = llama(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        return float(log_probs.gather(1, torch.tensor(ids)[:, None]).sum())

    beams, greedy = (
        generate_ids(llama, PROMPT, GenerationOptions(max_new_tokens=12, num_beams=n), (131,)) for n in (6, 1)
    )
    assert score(beams) > score(greedy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": True}, "a search draws nothing"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "choose one search"),
        ({"on_loop": "stop"}, "takes no guard against loops"),
    ],
)
def test_what_does_not_go_with_beams_is_refused(
    llama: Any, tokenizer: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        list(stream_text(llama, tokenizer, PROMPT, GenerationOptions(num_beams=3, **options), TERMINATORS))


# Streams


def test_a_stream_is_the_text_of_the_ids(llama: Any, tokenizer: Any) -> None:
    # 131 ids of the tiny tokenizer are single bytes and marks, so characters are split over tokens, or broken
    for seed in range(5):
        options = GenerationOptions(max_new_tokens=40, do_sample=True, top_k=0, seed=seed)
        ids = generate_ids(llama, PROMPT, options, (131,))
        assert "".join(stream_text(llama, tokenizer, PROMPT, options, (131,))) == decode_text(tokenizer, ids)


def test_a_terminator_that_is_ordinary_text_is_not_streamed(llama: Any, tokenizer: Any) -> None:
    options = GenerationOptions(max_new_tokens=20, no_repeat_ngram_size=1)
    whole = generate_ids(llama, PROMPT, options, (131,))
    terminator = next(token for token in whole[3:] if decode_text(tokenizer, [token]))
    expected = decode_text(tokenizer, whole[: whole.index(terminator)])
    assert "".join(stream_text(llama, tokenizer, PROMPT, options, (terminator,))) == expected


def count_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A function that tells how often the model has run since."""
    passes, forward = 0, model.forward

    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", counting)
    return lambda: passes


def test_a_closed_stream_runs_no_further(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(llama, monkeypatch)
    stream = stream_text(llama, tokenizer, PROMPT, GenerationOptions(max_new_tokens=50, no_repeat_ngram_size=1), (131,))
    assert passes() == 0
    assert next(stream)
    at_close = passes()
    stream.close()
    assert passes() == at_close < 50
    assert list(stream) == []


def test_streams_read_in_turn_draw_what_each_draws_alone(llama: Any, tokenizer: Any) -> None:
    options = [GenerationOptions(max_new_tokens=20, do_sample=True, top_k=0, seed=seed) for seed in (1, 2)]
    alone = [generate_ids(llama, PROMPT, option, (131,)) for option in options]
    assert alone[0] != alone[1]
    streams = [stream_ids(llama, PROMPT, option, (131,)) for option in options]
    assert [list(tokens) for tokens in zip(*zip(*streams, strict=True), strict=True)] == alone


def test_a_failure_comes_after_what_was_said_and_does_not_hang(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, forward = 0, llama.forward

    def failing_forward(*arguments: Any, **keywords: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > 6:
            raise MemoryError("out of memory")
        return forward(*arguments, **keywords)

    options = GenerationOptions(max_new_tokens=20, no_repeat_ngram_size=1)
    ids = generate_ids(llama, PROMPT, options, (131,))
    monkeypatch.setattr(llama, "forward", failing_forward)
    said = ""
    with pytest.raises(LoryError, match=r"^The answer could not be generated: out of memory\.$") as raised:  # noqa: PT012
        for piece in stream_text(llama, tokenizer, PROMPT, options, (131,)):
            said += piece
    assert said == decode_text(tokenizer, ids[:6]) != ""
    assert isinstance(raised.value.__cause__, MemoryError)


def test_a_refused_prompt_is_the_users_error(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="context ends at 64"):
        next(stream_text(llama, tokenizer, [9] * 64, GenerationOptions(), TERMINATORS))


# Batches


def test_each_prompt_of_a_batch_gets_what_it_gets_alone(llama: Any) -> None:
    prompts = [[5], PROMPT, [1, 3, 9, 27, 81, 12, 36, 108]]
    options = GenerationOptions(max_new_tokens=19, no_repeat_ngram_size=2, repetition_penalty=1.4)
    alone = [generate_ids(llama, prompt, options, (131,)) for prompt in prompts]
    assert generate_batch(llama, prompts, options, (131,)) == alone
    # of which the shorter end where they end alone
    end = next(token for token in alone[1][3:] if token not in alone[1][:3])
    alone = [generate_ids(llama, prompt, options, (end,)) for prompt in prompts]
    assert generate_batch(llama, prompts, options, (end,)) == alone
    assert len({len(ids) for ids in alone}) > 1


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_an_empty_prompt_is_refused(llama: Any, prompts: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="An empty prompt was given"):
        generate_batch(llama, prompts, GenerationOptions(), TERMINATORS)


def test_steps_come_with_logprobs_and_a_watcher_where_asked(llama: Any) -> None:
    seen: list[int] = []

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> None:
        seen.append(ids.shape[1])

    options = GenerationOptions(max_new_tokens=3)
    steps = list(stream_steps(llama, [PROMPT], options, (131,), watch=watch, logprobs=2))
    assert [step.tokens[0] for step in steps] == generate_ids(llama, PROMPT, options, (131,))
    assert [step.top_tokens[0, 0].item() for step in steps if step.top_tokens is not None] == [
        step.tokens[0] for step in steps
    ]
    assert seen == [5, 6, 7]


# Against repetition


def load_tiny(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def options(**given: Any) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=60, **given)


def test_contrastive_search_streams_what_generate_gives(tiny_model: Path) -> None:
    model, prompt = load_tiny(tiny_model), [3, 7, 5, 9]
    output = model.generate(
        torch.tensor([prompt]), custom_generate=contrastive_search, penalty_alpha=0.6, top_k=4, max_new_tokens=20,
        eos_token_id=[2], pad_token_id=2, do_sample=False,
    )  # fmt: skip
    expected = [token for token in output[0, 4:].tolist() if token != 2]
    assert (
        generate_ids(model, prompt, GenerationOptions(max_new_tokens=20, penalty_alpha=0.6, top_k=4), [2]) == expected
    )
    with pytest.raises(UsageError, match=r"penalty_alpha\) and do_sample"):
        generate_ids(model, prompt, options(penalty_alpha=0.6, do_sample=True), [2])


def test_a_penalty_with_a_window_differs_from_one_without(tiny_model: Path) -> None:
    model, prompt = load_tiny(tiny_model), [3, 7, 5, 9] * 4
    answers = [
        list(stream_ids(model, prompt, options(**given), [10**6]))
        for given in (
            {"repetition_penalty": 1.8},
            {"repetition_penalty": 1.8, "repetition_window": 100},
            {"repetition_penalty": 1.8, "repetition_window": 2},
            {"frequency_penalty": 5.0},
        )
    ]
    assert answers[0] == answers[1]
    assert answers[2] != answers[0]
    assert len(set(answers[3])) > len(set(stream_ids(model, prompt, options(), [10**6])))


@pytest.fixture
def circling(tiny_model: Path) -> tuple[Any, Any, list[int]]:
    """A model that says the same nine words in turn, for ever, its tokenizer, and the words' ids."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), load_tiny(tiny_model)
    words = make_circling(model, tokenizer)
    return model, tokenizer, words


def test_a_loop_ends_an_answer_where_that_is_wanted(circling: tuple[Any, Any, list[int]]) -> None:
    model, tokenizer, words = circling
    long = GenerationOptions(max_new_tokens=120)
    endings = {policy: Ending() for policy in ("off", "report", "stop", "penalize", "back_up")}
    texts = {
        policy: "".join(
            stream_text(model, tokenizer, words[:1], long.model_copy(update={"on_loop": policy}), [10**6], ending)
        )
        for policy, ending in endings.items()
    }
    assert texts["off"] == texts["report"] == decode_text(tokenizer, [words[(n + 1) % 9] for n in range(120)])
    loop = endings["report"].loops[0]
    assert (loop.start, loop.period) == (0, 9)
    assert (endings["off"].reason, endings["stop"].reason) == ("length", "repetition")
    assert texts["off"].startswith(texts["stop"])
    assert len(texts["stop"]) < len(texts["off"]) / 2
    assert texts["off"] not in (texts["penalize"], texts["back_up"])
