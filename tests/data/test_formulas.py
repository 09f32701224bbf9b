"""Formulas keep to their grammar, their pictures to their chances, and data sets of them to their splits."""

from __future__ import annotations

import io
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from lory.cli.formulas import formulas as command
from lory.data.making import formulas as module
from lory.data.making.formula_grammar import LEVELS, SIDES, Formula, LevelName, draw_formulas, join_tokens, vocabulary
from lory.data.making.formula_images import FONTS, STYLES, Style, lay_out, render
from lory.data.making.formulas import Recipe, count_sides, write_formulas
from lory.data.sources.read import SourceConfig, read_source
from lory.runtime import UsageError

LEVEL_NAMES: list[LevelName] = list(LEVELS)


def draw(count: int, level: LevelName = "medium", seed: int = 0) -> list[Formula]:
    return list(draw_formulas(count, level, seed))


def formula(text: str) -> Formula:
    return Formula(text, tuple(text.split()))


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_formulas_use_the_whole_vocabulary_and_nothing_else(level: LevelName) -> None:
    drawn = draw(1500, level)
    used = {token for formula in drawn for token in formula.tokens}
    known = vocabulary(level)
    assert used <= set(known)
    assert len(used) >= 0.95 * len(known)
    assert known == sorted(set(known))


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_formulas_keep_to_the_bounds_of_their_level(level: LevelName) -> None:
    fewest, most = LEVELS[level].tokens
    for formula in draw(300, level):
        assert fewest <= len(formula.tokens) <= most
        assert formula.text == " ".join(formula.tokens)
        assert nesting(formula) <= LEVELS[level].depth


def nesting(formula: Formula) -> int:
    """How many fractions and roots stand in one another at most, by the braces of their arguments."""
    depth = deepest = 0
    opened: list[int] = []
    for at, token in enumerate(formula.tokens):
        if token == "{":
            before = formula.tokens[at - 1]
            opened.append(int(before in (r"\frac", r"\sqrt")))
            depth += opened[-1]
            deepest = max(deepest, depth)
        elif token == "}":
            depth -= opened.pop()
    assert not opened
    return deepest


def test_levels_grow() -> None:
    lengths = [np.median([len(formula.tokens) for formula in draw(300, level)]) for level in LEVEL_NAMES]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 2 * lengths[0]
    easy, medium, hard = (set(vocabulary(level)) for level in LEVEL_NAMES)
    assert easy < medium
    assert medium < hard


def test_no_formula_comes_twice_and_a_seed_repeats_all() -> None:
    drawn = draw(2000, "easy", 5)
    assert len({formula.text for formula in drawn}) == 2000
    assert draw(50, "easy", 5) == drawn[:50]
    assert draw(50, "easy", 6) != drawn[:50]


def test_a_side_is_a_property_of_the_formula() -> None:
    everything = draw(400)
    by_side = {side: [formula for formula in everything if formula.side == side] for side in SIDES}
    assert all(15 > len(by_side[side]) / 400 * 100 > 1 for side in ("validation", "test"))
    for side, expected in by_side.items():
        assert list(draw_formulas(len(expected), "medium", 0, side)) == expected


def test_a_level_that_is_used_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from lory.data.making import formula_grammar

    monkeypatch.setattr(formula_grammar, "_GRAMMAR", "formula\n  1 easy x = one\n  1 easy y = x + 1\n")
    monkeypatch.setitem(LEVELS, "easy", formula_grammar.Level(depth=0, tokens=(3, 5)))
    formula_grammar._read_grammar.cache_clear()
    try:
        with pytest.raises(UsageError, match="3 formulas of the level easy were asked for, but after 2 none was new"):
            draw(3, "easy")
    finally:
        formula_grammar._read_grammar.cache_clear()


def test_brackets_are_stretched_just_around_what_is_tall() -> None:
    pairs = {"(": ")", "[": "]", r"\{": r"\}", r"\lfloor": r"\rfloor"}
    tall = {r"\frac", r"\binom", r"\sum", r"\prod", r"\int", r"\oint", r"\sqrt", r"\lim", r"\max"}
    tall |= {r"\bigcup", r"\bigoplus", r"\left."}
    seen = set()
    for tokens in (formula.tokens for formula in draw(1000, "hard")):
        opened: list[int] = []
        for at, token in enumerate(tokens):
            if token.removeprefix(r"\left") in pairs:
                opened.append(at)
            elif opened and token.removeprefix(r"\right") == pairs[tokens[opened[-1]].removeprefix(r"\left")]:
                start = opened.pop()
                stretched = token.startswith(r"\right")
                assert tokens[start].startswith(r"\left") == stretched
                assert bool(tall.intersection(tokens[start:at])) == stretched
                seen.add(tokens[start])
        assert not opened
    assert seen >= {*pairs, *(rf"\left{bracket}" for bracket in ("(", "[", r"\{"))}


def test_scripts_stand_below_first() -> None:
    for formula in draw(500, "hard"):
        closed: dict[int, str] = {}
        opened: list[str] = []
        for at, token in enumerate(formula.tokens):
            if token == "{":
                opened.append(formula.tokens[at - 1])
            elif token == "}":
                closed[at] = opened.pop()
            elif token == "_":
                assert closed.get(at - 1) != "^"


def test_unspaced_is_the_same_latex_with_fewer_spaces() -> None:
    given = formula(r"\frac { \alpha x _ { 1 0 } } { \sin x } \, d x")
    assert given.unspaced == r"\frac{\alpha x_{10}}{\sin x}\,d x".replace("d x", "dx")
    for drawn in draw(100, "hard"):
        assert drawn.unspaced.replace(" ", "") == drawn.text.replace(" ", "")
        assert join_tokens(drawn.tokens) == drawn.unspaced


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_every_formula_can_be_rendered(level: LevelName, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fonts = itertools.cycle(FONTS)
    for drawn in draw(20, level, 1):
        assert len(lay_out(drawn, next(fonts))) >= 3
    assert not caplog.text  # of a symbol that is in no font


def test_every_symbol_is_in_every_font_and_looks_like_no_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    structure = {"{", "}", "_", "^", r"\,", r"\quad", r"\frac", r"\binom", r"\sqrt", r"\overline", r"\widehat"}
    accents = {r"\hat", r"\bar", r"\vec", r"\tilde", r"\dot", r"\ddot", r"\mathcal", r"\mathbf", r"\mathbb", r"\mathrm"}
    symbols = [token for token in vocabulary("hard") if token not in structure and "\\left" not in token]
    symbols = [token for token in symbols if "\\right" not in token]
    for font in FONTS:
        seen: dict[bytes, str] = {}
        for symbol in symbols:
            given = formula(f"{symbol} {{ R }}" if symbol in accents else symbol)
            outline = np.concatenate([part.points.ravel() for part in lay_out(given, font)]).round(4).tobytes()
            assert outline not in seen, f"{symbol} is {seen.get(outline)} in {font}"
            seen[outline] = symbol
    assert not caplog.text


@pytest.mark.parametrize("font", FONTS)
def test_scripts_are_small_and_off_the_line(font: str) -> None:
    plain, *scripts = sorted(lay_out(formula("x _ { x } ^ { x }"), font), key=lambda symbol: -symbol.scale)
    below, above = sorted(scripts, key=lambda symbol: symbol.points[:, 1].min())
    assert below.scale == above.scale < plain.scale == 1
    assert below.points[:, 1].min() < plain.points[:, 1].min() - 0.05
    assert above.points[:, 1].min() > plain.points[:, 1].min() + 0.2


def test_a_fraction_is_as_large_as_in_a_display_but_not_in_a_script() -> None:
    assert [symbol.scale for symbol in lay_out(formula(r"\frac { a } { b }"), "cm")] == [1, 1, 1]
    scales = [symbol.scale for symbol in lay_out(formula(r"x ^ { \frac { a } { b } }"), "cm")]
    assert scales[0] == 1 > scales[1] == scales[2]


@pytest.mark.parametrize("font", FONTS)
def test_a_stretched_bar_is_as_thin_as_a_small_one(font: str) -> None:
    (small, *_), (tall, *_) = (lay_out(formula(text), font) for text in ("|", r"\left| \frac { a } { b } \right|"))
    (width, height), (tall_width, tall_height) = (np.ptp(symbol.points, axis=0) for symbol in (small, tall))
    assert tall_height > 1.3 * height
    assert tall_width == pytest.approx(width)


def test_fractions_side_by_side_are_kept_apart() -> None:
    lines = [part.points[:, 0] for part in lay_out(formula(r"\frac { a } { b } \frac { c } { d }"), "stix")[-2:]]
    assert lines[1].min() - lines[0].max() > 0.1


@pytest.mark.parametrize("style", STYLES)
def test_a_picture_is_dark_ink_on_light_paper_with_a_margin(style: Style) -> None:
    given = formula(r"x = \frac { 1 } { 2 }")
    for seed in range(12):
        pixels = picture(render(given, style, np.random.default_rng(seed)))
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.median(pixels) >= 170
        assert edge.min() > pixels.min() + 80
        assert 0.01 < (pixels < np.median(pixels) - 80).mean() < 0.4


@pytest.mark.parametrize("style", STYLES)
def test_chances_decide_alone_how_a_picture_looks(style: Style) -> None:
    given = draw(1)[0]
    one, same, other = (render(given, style, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one == same
    assert (one == other) is (style == "typeset")


def test_typeset_pictures_are_alike_in_all_but_their_formula() -> None:
    """One font, one size and white paper: a fraction is as high everywhere, and its bar in the same row of pixels."""
    bars = set()
    for seed, text in enumerate((r"\frac { a } { b }", r"x + \frac { a } { b }", r"\frac { a } { b } x")):
        pixels = picture(render(formula(text), "typeset", np.random.default_rng(seed)))
        assert pixels[0].min() == pixels.max() == 255
        bars.add((len(pixels), int((255.0 - pixels).sum(axis=1).argmax())))
    assert len(bars) == 1


def test_handwriting_has_no_two_alike() -> None:
    """The same letter twice: in print it is shifted, in handwriting it is another one."""

    def widths(style: Style) -> list[int]:
        rng = np.random.default_rng(1)
        pixels = picture(render(formula(r"H \quad H \quad H \quad H"), style, rng))
        columns = (pixels < np.median(pixels) - 60).any(axis=0).astype(int)
        edges = np.flatnonzero(np.diff(columns, prepend=0, append=0))
        return (edges[1::2] - edges[::2]).tolist()

    assert len(widths("print")) == len(widths("handwriting")) == 4
    assert max(widths("print")) - min(widths("print")) <= 1
    assert max(widths("handwriting")) - min(widths("handwriting")) > 1


def test_sides_add_up() -> None:
    assert count_sides(5000) == {"train": 4500, "validation": 250, "test": 250}
    assert count_sides(3) == {"train": 1, "validation": 1, "test": 1}
    with pytest.raises(UsageError, match="give at least 3, one for each split"):
        count_sides(2)


def read(folder: Path) -> dict[str, list[dict]]:
    return {side: pyarrow.parquet.read_table(folder / f"{side}.parquet").to_pylist() for side in SIDES}


def test_a_data_set_is_written_with_its_card(tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    tally = write_formulas(tmp_path / "set", Recipe(24, "easy"), 1, lambda *numbers: shown.append(numbers))
    rows = read(tmp_path / "set")
    assert {side: len(found) for side, found in rows.items()} == tally.rows == {"train": 22, "validation": 1, "test": 1}
    assert shown[-1] == (24, 24)
    everything = [row for found in rows.values() for row in found]
    assert len({row["text"] for row in everything}) == len({row["image"]["path"] for row in everything}) == 24
    for side, found in rows.items():
        for row in found:
            assert picture(row["image"]["bytes"]).ndim == 2
            assert formula(row["text"]).side == side
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "| train | 22 |" in card
    assert "lory data formulas DIR -n 24 --level easy --style print --seed 0 --spaced" in card
    assert sum(len(row["image"]["bytes"]) for row in everything) == tally.image_bytes


def test_a_data_set_is_read_as_images_with_text(tmp_path: Path) -> None:
    import datasets

    write_formulas(tmp_path / "set", Recipe(3, "easy", spaced=False))
    path = tmp_path / "set" / "train.parquet"
    conversation = read_source(SourceConfig(path=str(path))).conversations[0]
    (row,) = pyarrow.parquet.read_table(path).to_pylist()
    assert [media.source for media in conversation.messages[0].media] == [row["image"]["bytes"]]
    assert conversation.messages[1].content == row["text"] == draw_train(1)[0].unspaced
    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
    assert isinstance(features["image"], datasets.Image)


def draw_train(count: int) -> list[Formula]:
    return list(draw_formulas(count, "easy", 0, "train"))


def test_the_number_of_processes_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    for workers in (1, 3):
        write_formulas(tmp_path / str(workers), Recipe(20, "easy", "handwriting", 7), workers)
    for name in ("train.parquet", "test.parquet", "README.md"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_pictures_of_two_splits_have_chances_of_their_own(tmp_path: Path) -> None:
    write_formulas(tmp_path / "set", Recipe(3, "easy"))
    sizes = {picture(row["image"]["bytes"]).shape for found in read(tmp_path / "set").values() for row in found}
    assert len(sizes) == 3


def test_nothing_is_overwritten_and_nothing_left_half_done(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").touch()
    for folder in (tmp_path / "set", tmp_path / "set" / "mine.txt"):
        with pytest.raises(UsageError, match="exists already; delete it first"):
            write_formulas(folder, Recipe(3, "easy"))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_formulas(tmp_path / "new", Recipe(3, "easy"), 1, stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    app = typer.Typer()
    app.command()(command)

    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


def test_the_command_tells_what_it_wrote(tmp_path: Path, run: Callable[..., str]) -> None:
    options = ("-n", 4, "--level", "easy", "--style", "handwriting", "--seed", 3, "--unspaced")
    told = json.loads(run(tmp_path / "a", *options, "--json"))
    assert told["rows"] == {"train": 2, "validation": 1, "test": 1}
    assert told["path"] == str(tmp_path / "a")
    assert told["bytes_per_image"] > 100
    assert 5 <= told["tokens"]["median"] <= told["tokens"]["most"] <= 40
    text = run(tmp_path / "b", *options)
    assert text.startswith(f"{tmp_path / 'b'}: 2 train, 1 validation, 1 test\n")
    assert (tmp_path / "a" / "train.parquet").read_bytes() == (tmp_path / "b" / "train.parquet").read_bytes()
