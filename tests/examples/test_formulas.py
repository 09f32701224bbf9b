"""The example that trains a small Qwen2-VL on formulas: its vocabulary, its model, a few steps, and its measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from examples.formulas import base, measure

import lory
from lory.config import read_yaml
from lory.data.making.formula_grammar import LEVELS, draw_formulas
from lory.data.making.formulas import Recipe, write_formulas
from lory.runtime import UsageError
from lory.training.config import read_config

FOLDER = Path(base.__file__).parent
TINY = {"width": 64, "layers": 1, "vision_width": 32, "depth": 1}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formulas") / "untrained"
    base.write_base(folder, **TINY)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formulas") / "easy"
    write_formulas(folder, Recipe(24, "easy"), workers=1)
    return folder


def test_every_formula_comes_back_from_its_tokens() -> None:
    tokenizer = base.build_tokenizer()
    for level in LEVELS:
        for formula in draw_formulas(40, level, seed=3):
            for text in (formula.text, formula.unspaced):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.decode(ids) == text
                assert tokenizer.unk_token_id not in ids


def test_a_space_belongs_to_the_token_after_it() -> None:
    tokens = base.build_tokenizer().tokenize(r"\alpha x ^ {2}  y")
    assert tokens == ["\\alpha", " x", " ^ {", "2", "}", " ", " y"]


def test_what_comes_together_is_one_token_in_both_ways_of_writing() -> None:
    tokenizer = base.build_tokenizer()
    assert tokenizer.tokenize(r"\frac { a _ { 1 } ^ { 2 } } { \left( b \right) }") == [
        *["\\frac {", " a", " _ {", " 1", " } ^ {", " 2", " }", " } {", " \\left(", " b", " \\right)", " }"]
    ]
    assert tokenizer.tokenize(r"\frac{a_{1}^{2}}{\left(b\right)}") == [
        *["\\frac{", "a", "_{", "1", "}^{", "2", "}", "}{", "\\left(", "b", "\\right)", "}"]
    ]


@pytest.mark.parametrize("question", [base.QUESTION, base.TERSE_QUESTION])
def test_a_question_is_one_token_and_a_prompt_has_six_beside_the_picture(question: str) -> None:
    tokenizer = base.build_tokenizer()
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    tokens = tokenizer.tokenize(prompt)
    assert tokens == [
        "<|user|>",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|vision_end|>",
        question,
        "<|end|>",
        "<|assistant|>",
    ]


def test_the_untrained_model_answers_a_picture(untrained: Path, pictures: Path) -> None:
    told = measure.measure(str(untrained), pictures / "test.parquet", 1, 1)
    assert told["pictures"] == 1
    assert told["exact"] == 0


def test_a_full_folder_is_left_alone(untrained: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        base.write_base(untrained, **TINY)


@pytest.mark.parametrize("name", ["easy.yaml", "medium.yaml", "unspaced.yaml"])
def test_the_configs_are_valid_and_ask_the_question_of_the_vocabulary(name: str) -> None:
    config, _ = read_config(FOLDER / name)
    questions = {source.question for source in config.data.train}
    assert base.QUESTION in questions
    assert questions <= {base.QUESTION, base.TERSE_QUESTION}


def change(name: str, model: Path, pictures: Path, output: Path) -> dict[str, Any]:
    """The example's config with its paths replaced, for ten short steps."""
    values = read_yaml(FOLDER / name)
    values["model"]["path"], values["output"] = str(model), str(output)
    for key, side in (("train", "train"), ("eval", "validation")):
        values["data"][key] = [values["data"][key][0] | {"path": str(pictures / f"{side}.parquet")}]
    values["train"] |= {"epochs": 10, "max_steps": 10, "log_every_steps": 5}
    return values


def test_ten_steps_from_scratch_learn_something_and_an_adapter_goes_on_top(
    untrained: Path, pictures: Path, tmp_path: Path
) -> None:
    first = lory.train(change("easy.yaml", untrained, pictures, tmp_path / "easy"))
    entries = [json.loads(line) for line in (first.folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]
    second = lory.train(change("unspaced.yaml", first.folder, pictures, tmp_path / "unspaced"))
    assert (second.folder / "last" / "adapter_model.safetensors").is_file()


def test_scores_tell_reading_from_writing() -> None:
    spaced, unspaced = r"\frac { \alpha x } { 2 }", r"\frac{\alpha x}{2}"
    assert measure.score([spaced], [spaced]) == {"exact": 1, "formula": 1, "spaced": 1, "unspaced": 0}
    assert measure.score([unspaced], [spaced]) == {"exact": 0, "formula": 1, "spaced": 0, "unspaced": 1}
    assert measure.score([r"\frac{\alpha x}{3}"], [spaced])["formula"] == 0


def test_every_formula_of_the_grammar_is_of_both_styles_as_it_is_written() -> None:
    for level in LEVELS:
        for formula in draw_formulas(100, level, seed=4):
            assert measure.stretch(formula.unspaced) == formula.text
            assert measure.squeeze(formula.text) == formula.unspaced
