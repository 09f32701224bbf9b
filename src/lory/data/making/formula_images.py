"""Pictures of formulas, set by matplotlib's mathtext and drawn symbol by symbol.

A formula is bent, slanted, turned and made bolder as outlines, before there are any pixels, so each picture is sharp at
its size; only blur and noise come afterwards, as they do in a scan.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from matplotlib.backend_bases import GraphicsContextBase
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import text_to_path
from matplotlib.transforms import IdentityTransform
from PIL import Image, ImageFilter

from lory.data.making.formula_grammar import Formula, join_tokens

Style = Literal["print", "typeset", "handwriting"]
STYLES: tuple[Style, ...] = get_args(Style)
FONTS = ("dejavusans", "dejavuserif", "cm", "stix", "stixsans")

Points = np.ndarray[Any, np.dtype[np.float64]]
"""Coordinates [N, 2], y upwards."""
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Range = tuple[float, float]
"""Ends of a uniform draw."""


class Symbol(NamedTuple):
    """A symbol's outline, or that of a line."""

    points: Points
    """In em of the formula."""
    codes: Any
    """What matplotlib does at each point."""
    scale: float
    """1 on the line, less in a script."""


_LINE_POINTS = 24
"""Points along each side of a line (of a fraction, say), so that it can be bent."""
_BAR = 6
"""How many times as tall as wide a bar is at least."""
_WAVES = 6


@dataclass(frozen=True, slots=True)
class Look:
    """How pictures of a style may look; a single number is the deviation of a normal draw."""

    size: Range
    """Pixels of an em."""
    bold: Range
    """Width of the line around the outlines, in em."""
    ink: Range
    """Grey level, 0 to 255; the paper's is at least 170 above."""
    blur: Range
    """Radius in pixels."""
    noise: Range
    """Standard deviation in grey levels."""
    turn: float
    """Degrees."""
    fonts: tuple[str, ...] = FONTS
    margin: Range = (0.15, 0.7)
    """Around the formula, on each side by itself, in em."""
    clean: float = 0.4
    """Share of pictures on white paper without noise."""
    slant: float = 0
    """Shift in em for each em upwards."""
    bend: float = 0
    """Displacement by a smooth random field, in em."""
    symbol_bold: float = 0
    """The same of each symbol by itself: width of its line in em, ..."""
    symbol_shift: float = 0
    """... displacement in em, ..."""
    symbol_turn: float = 0
    """... degrees, ..."""
    symbol_size: float = 0
    """... and relative size."""


LOOKS: dict[Style, Look] = {
    "print": Look(size=(18, 36), bold=(0, 0.03), ink=(0, 60), blur=(0, 0.7), noise=(0, 8), turn=0.6),
    # as in im2latex, whose pictures all come out of one LaTeX
    "typeset": Look(
        size=(24, 24),
        bold=(0, 0),
        ink=(0, 0),
        blur=(0, 0),
        noise=(0, 0),
        turn=0,
        fonts=("cm",),
        margin=(0.25, 0.25),
        clean=1,
    ),
    "handwriting": Look(
        size=(22, 40),
        bold=(0.005, 0.045),
        ink=(0, 85),
        blur=(0, 0.8),
        noise=(0, 8),
        turn=1.2,
        slant=0.12,
        bend=0.035,
        symbol_bold=0.012,
        symbol_shift=0.018,
        symbol_turn=2.5,
        symbol_size=0.05,
    ),
}


def render(formula: Formula, style: Style, rng: np.random.Generator) -> bytes:
    """Draw a formula as a grey PNG, its font, size, weight, angle, blur, noise and (handwriting) shapes by chance.

    The same state of `rng` gives the same picture, as long as matplotlib, Pillow and numpy stay the same.
    """
    look = LOOKS[style]
    symbols = lay_out(formula, look.fonts[rng.integers(len(look.fonts))])
    size = rng.uniform(*look.size)
    symbols = _distort(symbols, look, rng)
    bold = np.maximum(rng.uniform(*look.bold) + look.symbol_bold * rng.standard_normal(len(symbols)), 0)
    ink = _draw(symbols, size, bold * size, look.margin, rng)
    return _print(ink, look, rng)


def lay_out(formula: Formula, font: str) -> list[Symbol]:
    """The outlines of a formula's symbols in one of `FONTS`."""
    text = _write_display(formula)
    glyphs, outlines, lines = text_to_path.get_glyphs_mathtext(FontProperties(math_fontfamily=font), text)
    em = text_to_path.FONT_SCALE
    symbols = []
    for glyph, x, y, scale in glyphs:
        vertices, codes = outlines[glyph]
        if len(vertices):  # a space has none
            closing = np.flatnonzero(codes == Path.CLOSEPOLY)
            points = vertices * scale
            points[closing] = points[closing - 1]  # they stand at the origin, and have no meaning there
            symbols.append(Symbol((_thin(points, scale) + np.array([x, y])) / em, codes, scale))
    for corners, _ in lines:
        symbols.append(_outline_line(np.array(corners[0]) / em, np.array(corners[2]) / em))
    return symbols


def _thin(points: Points, scale: float) -> Points:
    """A stretched bar as thin as a small one; mathtext makes it thicker in the same measure."""
    (left, bottom), (right, top) = points.min(axis=0), points.max(axis=0)
    if scale <= 1 or top - bottom < _BAR * (right - left):
        return points
    middle = (left + right) / 2
    return np.column_stack([middle + (points[:, 0] - middle) / scale, points[:, 1]])


def _write_display(formula: Formula) -> str:
    """The formula as mathtext needs it to look as a displayed formula does in LaTeX."""
    tokens, depth = list(formula.tokens), 0
    for at, token in enumerate(formula.tokens):
        depth += (token == "{") - (token == "}")
        if token == r"\frac":
            # LaTeX keeps fractions apart that stand side by side
            apart = r"\," if at and formula.tokens[at - 1] == "}" else ""
            tokens[at] = apart + (token if depth else r"\dfrac")
    # with a space before ^ or _, mathtext sets the script on the line without a word
    return f"${join_tokens(tokens)}$"


def _outline_line(low: Points, high: Points) -> Symbol:
    """The rectangle between two corners, with points along its length."""
    along = np.linspace(low[0], high[0], _LINE_POINTS)
    lower = np.column_stack([along, np.full(_LINE_POINTS, low[1])])
    upper = np.column_stack([along[::-1], np.full(_LINE_POINTS, high[1])])
    points = np.concatenate([lower, upper, lower[:1]])
    codes = np.full(len(points), Path.LINETO)
    codes[0], codes[-1] = Path.MOVETO, Path.CLOSEPOLY
    return Symbol(points, codes, 1)


def _distort(symbols: list[Symbol], look: Look, rng: np.random.Generator) -> list[Symbol]:
    """Each symbol moved by itself, and the whole bent, slanted and turned."""
    moved = [_move(symbol.points, look, rng) for symbol in symbols]
    points = np.concatenate(moved)
    if look.bend:
        points = points + look.bend * _wave(points, rng)
    slant, turn = look.slant * rng.standard_normal(), look.turn * rng.standard_normal()
    points = points @ (_rotation(turn) @ np.array([[1, slant], [0, 1]])).T
    parts = np.split(points, np.cumsum([len(part) for part in moved])[:-1])
    return [symbol._replace(points=part) for symbol, part in zip(symbols, parts, strict=True)]


def _move(points: Points, look: Look, rng: np.random.Generator) -> Points:
    """Turn, scale and shift a symbol about its middle."""
    shift = look.symbol_shift * rng.standard_normal(2)
    low, high = points.min(axis=0), points.max(axis=0)
    # the ends of what is long move no farther than those of a letter
    most = max(float((high - low).max()), 1)
    scale = np.exp(look.symbol_size * rng.standard_normal() / most)
    turn = look.symbol_turn * rng.standard_normal() / most
    middle = (low + high) / 2
    return (points - middle) @ (scale * _rotation(turn)).T + middle + shift


def _rotation(degrees: float) -> Points:
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _wave(points: Points, rng: np.random.Generator) -> Points:
    """A smooth random displacement of variance 1 at each of the points [N, 2].

    A sum of plane waves of 1 to 8 em, which unlike the smoothed noise of Simard et al. (2003, "Best practices for
    convolutional neural networks", section 2) can be taken at single points.
    """
    angle = rng.uniform(0, 2 * np.pi, _WAVES)
    number = 2 * np.pi / np.exp(rng.uniform(np.log(1), np.log(8), _WAVES))
    waves = number * np.stack([np.cos(angle), np.sin(angle)])
    phases = points @ waves
    return np.stack(
        [np.sin(phases + rng.uniform(0, 2 * np.pi, _WAVES)).sum(axis=1) * np.sqrt(2 / _WAVES) for _ in range(2)], axis=1
    )


def _draw(symbols: list[Symbol], size: float, bold: Points, margin: Range, rng: np.random.Generator) -> Pixels:
    """How much of each pixel is ink, [H, W], with a margin around the formula.

    Args:
        size: pixels of an em.
        bold: width of the line around each symbol, in pixels.
        margin: in em.
    """
    margins = rng.uniform(*margin, (2, 2)) * size
    points = np.concatenate([symbol.points for symbol in symbols]) * size
    low, high = points.min(axis=0) - margins[0], points.max(axis=0) + margins[1]
    width, height = np.ceil(high - low).astype(int)
    renderer = RendererAgg(int(width), int(height), 72)
    context = GraphicsContextBase()
    context.set_snap(False)
    context.set_joinstyle("round")
    for symbol, line in zip(symbols, bold, strict=True):
        context.set_linewidth(line * symbol.scale)
        renderer.draw_path(context, Path(symbol.points * size - low, symbol.codes), IdentityTransform(), (0, 0, 0))
    return np.asarray(renderer.buffer_rgba())[..., 3]


def _print(ink: Pixels, look: Look, rng: np.random.Generator) -> bytes:
    """Ink on paper as a PNG."""
    level = rng.uniform(*look.ink)
    clean = rng.random() < look.clean
    paper = 255.0 if clean else rng.uniform(level + 170, 255)
    blurred = Image.fromarray(ink).filter(ImageFilter.GaussianBlur(rng.uniform(*look.blur)))
    grey = paper + (level - paper) / 255 * np.asarray(blurred, dtype=np.float32)
    if not clean:
        grey += rng.uniform(*look.noise) * rng.standard_normal(grey.shape, dtype=np.float32)
    file = io.BytesIO()
    Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
