r"""Formulas out of a grammar: LaTeX in tokens, in three levels, each with a closed vocabulary.

One picture, one writing: what looks the same is written the same way, so that the text can be read off the picture.
Scripts stand below first (``x _ { i } ^ { 2 }``); scripts and arguments have braces and nothing else has; the space
before a differential is ``\,`` and that before a condition ``\quad``; brackets are ``\left(`` and ``\right)`` just
where what they hold is taller than a line. Only what matplotlib's mathtext can set is drawn.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from lory.runtime import UsageError

LevelName = Literal["easy", "medium", "hard"]
Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, slots=True)
class Level:
    """How large the formulas of a level are; which rules it has, the grammar says."""

    depth: int
    """How many parts such as fractions may stand in one another."""
    tokens: tuple[int, int]
    """Fewest and most tokens."""


LEVELS: dict[LevelName, Level] = {
    "easy": Level(depth=1, tokens=(5, 40)),
    "medium": Level(depth=2, tokens=(10, 90)),
    "hard": Level(depth=3, tokens=(20, 130)),
}

# Under each name its rules, one a line: weight, the easiest level that has it, and what it stands for. <name> is drawn
# in turn, and <+name> one deeper; no name is drawn deeper than the level goes. Symbols in `one of` are rules, too.
_GRAMMAR = r"""
formula
  6 easy <statement>
  1 medium <statement> <stop>
  1 medium <statement> , \quad <condition>
  3 hard <statement> <stop>
  1 hard <statement> , \quad <statement> .
stop
  1 medium .
  1 medium ,
condition
  2 medium <letter> <order> <number>
  1 medium <index> = 1 , 2 , \ldots , <letter>
  1 hard \forall <letter> \in <set>
statement
  6 easy <name> <relation> <sum>
  4 easy <sum> <relation> <sum>
  1 easy <sum>
  2 medium <name> <relation> <sum> <relation> <sum>
  3 hard <sum> <relation> <sum>
sum
  5 easy <term>
  5 easy <term> <sign> <term>
  2 easy <term> <sign> <term> <sign> <term>
  1 easy - <term>
  3 hard <term> <sign> <term>
term
  6 easy <factor>
  3 easy <factor> <factor>
  2 easy <number> <factor>
  1 easy <number>
  2 medium <number> <factor> <factor>
  1 medium <factor> <operator> <factor>
  3 medium <last>
  2 medium <factor> <last>
  3 hard <factor> <factor> <factor>
factor
  8 easy <symbol>
  7 easy <script>
  4 easy \frac { <+sum> } { <+sum> }
  2 easy \sqrt { <+sum> }
  2 easy \left( <+pair> \right)
  6 medium <script>
  2 medium \frac { <+sum> } { <+sum> }
  1 medium \left( <+pair> \right) ^ { <power> }
  2 medium <mapping> \left( <arguments> \right)
  3 medium <+derivative>
  1 medium \left| <name> \right|
  16 hard <script>
  1 hard \sqrt [ <root> ] { <+sum> }
  1 hard \left[ <+pair> \right]
  1 hard \left[ <+sum> , <+sum> \right]
  1 hard \left\{ <+pair> \right\}
  1 hard \left\langle <+sum> \right\rangle
  1 hard \left| <+pair> \right|
  1 hard \left. \frac { <+sum> } { <+sum> } \right| _ { <letter> = <bound> }
  1 hard \langle <symbol> | <symbol> \rangle
  1 hard \left\| <name> \right\|
  1 hard \left\lfloor <name> / <number> \right\rfloor
  1 hard \binom { <+short> } { <+short> }
  1 hard \overline { <letter> <letter> }
  1 hard \widehat { <letter> <letter> }
  1 hard <styled> \left( <arguments> \right)
  3 hard <gradient>
pair
  4 easy <term> <sign> <term>
  1 hard <term> <sign> <term> <sign> <term>
short
  2 hard <letter>
  1 hard <letter> <sign> <number>
last
  3 medium <function> <symbol>
  2 medium <function> \left( <+sum> \right)
  1 medium <function> ^ { 2 } <symbol>
  1 medium \log _ { <number> } <symbol>
  3 medium \sum _ { <index> = <start> } ^ { <end> } <+term>
  1 medium \sum _ { <index> } <+term>
  1 medium \prod _ { <index> = <start> } ^ { <end> } <+term>
  3 medium \int _ { <bound> } ^ { <bound> } <+term> \, d <variable>
  1 medium \int <+term> \, d <variable>
  1 medium \lim _ { <letter> \to <bound> } <+term>
  1 hard \oint _ { <capital> } <+term> \, d <variable>
  1 hard \int d ^ { <number> } <variable> \, <+term>
  1 hard \max _ { <letter> } <+term>
  1 hard \bigcup _ { <index> = <start> } ^ { <end> } <script>
  1 hard \bigoplus _ { <index> } <script>
derivative
  2 medium \frac { d } { d <variable> }
  2 medium \frac { d <name> } { d <variable> }
  2 medium \frac { \partial <name> } { \partial <variable> }
  1 medium \frac { d ^ { 2 } <name> } { d <variable> ^ { 2 } }
  2 hard \frac { \partial ^ { 2 } <name> } { \partial <variable> ^ { 2 } }
gradient
  3 hard \partial _ { <greek> } <name>
  1 hard \partial ^ { <greek> } <name>
  1 hard \nabla <name>
  1 hard \nabla ^ { 2 } <name>
mapping
  3 medium <function letter>
  1 medium <function letter> _ { <index> }
  1 medium <function letter> ^ { \prime }
arguments
  3 medium <variable>
  1 medium <variable> , <variable>
  1 medium 0
  1 hard <script>
name
  4 easy <symbol>
  2 easy <script>
  1 medium <mapping> \left( <arguments> \right)
  3 hard <script>
script
  5 easy <symbol> ^ { <power> }
  4 easy <symbol> _ { <low> }
  1 easy <symbol> _ { <low> } ^ { <power> }
  2 medium <symbol> _ { <low> } ^ { <power> }
  1 medium e ^ { <+sum> }
  2 hard <accented> _ { <low> }
  1 hard <styled> _ { <low> }
  2 hard <symbol> _ { <low> } ^ { <high> }
power
  4 easy 2
  2 easy <number>
  2 easy <index>
  1 easy <index> <sign> <number>
  1 medium - <number>
  1 medium \prime
  1 medium <number> / 2
  1 hard *
  1 hard \dagger
  1 hard ( <index> )
  1 hard <+sum>
high
  2 hard <greek>
  2 hard <greek> <greek>
  1 hard <index> <index>
  1 hard ( <number> )
low
  4 easy <index>
  3 easy <number>
  1 easy 0
  2 medium <greek>
  1 medium <index> <index>
  1 medium <index> <sign> 1
  2 hard <greek> <greek>
  1 hard \mathrm { <letter> }
root
  2 hard 3
  1 hard <index>
start
  2 medium 1
  2 medium 0
  1 hard - \infty
end
  3 medium <end letter>
  2 medium \infty
  1 hard <end letter> - 1
bound
  3 medium 0
  1 medium 1
  2 medium \infty
  1 medium <letter>
  1 medium - <letter>
symbol
  16 easy <letter>
  6 easy <greek>
  6 medium <capital>
  2 medium <accented>
  1 hard <styled>
  1 hard \ell
  1 hard \hbar
accented
  2 medium <accent> { <letter> }
  1 medium <accent> { <greek> }
  1 hard <accent> { <capital> }
styled
  2 hard \mathcal { <capital> }
  1 hard \mathbf { <capital> }
  1 hard \mathbf { <letter> }
set
  1 hard \mathbb { <set letter> }
  1 hard <capital>
number
  5 easy one of 2 3 4
  2 easy one of 5 6 7 8 9
  1 easy <digit> <digit or 0>
digit
  1 easy one of 1 2 3 4 5 6 7 8 9
digit or 0
  1 easy one of 0 1 2 3 4 5 6 7 8 9
letter
  3 easy one of a b c x y z
  1 easy one of d k m n p q r
  1 medium one of e f g h i j s t u v w
capital
  2 medium one of A B C D E F G H K L M N P R S T V X
  1 hard one of J Q U W Y Z
greek
  3 easy one of \alpha \beta \gamma \theta \lambda \mu \pi \sigma
  2 medium one of \delta \epsilon \nu \phi \rho \omega \tau \psi \eta \Delta \Phi \Gamma \Omega
  1 hard one of \kappa \xi \zeta \chi \Lambda \Psi \Sigma \Theta \Pi \Xi
index
  1 easy one of k m n
  3 medium one of i j k n
variable
  1 medium one of r s t u x y z \theta \tau
end letter
  1 medium one of m n k N
set letter
  1 hard one of C N Q R Z
accent
  1 medium one of \hat \bar \vec
  1 hard one of \tilde \dot \ddot
function letter
  1 medium one of f g h \phi \psi F G
function
  1 medium one of \sin \cos \tan \ln \exp
  1 hard one of \sinh \cosh \tanh \det \arctan
sign
  1 easy one of + -
operator
  2 medium one of \pm \cdot \times
  1 hard one of \mp \otimes \oplus \wedge \circ
order
  1 medium one of < > \leq \geq \neq
relation
  9 easy =
  1 easy one of < >
  3 medium one of \leq \geq \neq \approx \to
  9 hard =
  3 hard one of \equiv \sim \simeq \propto \ll \gg \cong \subset \in
"""

_TALL = {r"\frac", r"\binom", r"\sqrt", r"\sum", r"\prod", r"\int", r"\oint", r"\bigcup", r"\bigoplus"}
_TALL |= {r"\lim", r"\max", r"\left."}
_STRETCHED = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor", "|": "|", r"\|": r"\|"}
"""Brackets that the grammar writes with \\left and \\right, and that lose these around what is not tall."""
_TRIES = 5_000
"""Draws in a row that may give nothing new before a level counts as used up."""
_BUCKETS = 20
"""Of so many parts of all formulas one is for validation, one for the test, and the rest for training."""
_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Formula:
    """A formula in LaTeX: `text` is its tokens with spaces between."""

    text: str
    tokens: tuple[str, ...]

    @property
    def unspaced(self) -> str:
        """The same LaTeX with only the spaces it needs: between a command and a letter."""
        return join_tokens(self.tokens)

    @property
    def side(self) -> Side:
        """Whether it is for training, validation or the test, by a hash of its text alone.

        So a formula keeps its side whatever the seed, count, level and style: what one data set tests, none trains on.
        """
        bucket = int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "big") % _BUCKETS
        return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


Part = tuple[str, int]
"""What a rule is made of: a token with `_TOKEN`, or a name with 1 where it is drawn one deeper, else 0."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a name can stand for, each with its weight."""

    parts: list[list[Part]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, parts: list[Part], weight: float) -> None:
        self.parts.append(parts)
        self.weights.append(weight)

    def draw(self, rng: random.Random) -> list[Part]:
        return rng.choices(self.parts, self.weights)[0]


_Grammar = dict[str, _Rules]


def join_tokens(tokens: Iterable[str]) -> str:
    """The tokens as LaTeX with only the spaces it needs."""
    return re.sub(r"(\\[A-Za-z]+ )(?=[A-Za-z])| ", lambda found: found[1] or "", " ".join(tokens))


def draw_formulas(count: int, level: LevelName, seed: int, side: Side | None = None) -> Iterator[Formula]:
    """Draw `count` formulas, no two of them alike; the same ones for the same seed, and a longer list begins as a
    shorter one does.

    Args:
        side: draw only formulas of this side, such as fresh ones to train on that no test has.

    Raises:
        UsageError: the level has not so many formulas.
    """
    rng = random.Random(f"{level} {seed}")
    seen: set[str] = set()
    tries = 0
    while len(seen) < count:
        formula = draw_formula(level, rng)
        tries += 1
        if formula.text not in seen and side in (None, formula.side):
            seen.add(formula.text)
            tries = 0
            yield formula
        elif tries == _TRIES:
            raise UsageError(
                f"{count:,} formulas of the level {level} were asked for, but after {len(seen):,} none was new in "
                f"{_TRIES:,} draws; ask for fewer or for a harder level."
            )


def draw_formula(level: LevelName, rng: random.Random) -> Formula:
    """Draw one formula, of as many tokens as the level allows."""
    fewest, most = LEVELS[level].tokens
    while True:
        tokens = _draw(*_read_grammar(level), LEVELS[level].depth, most, rng)
        if len(tokens) in range(fewest, most + 1):
            tokens = _fit_brackets(tokens)
            return Formula(" ".join(tokens), tuple(tokens))


def _draw(every: _Grammar, flat: _Grammar, depth: int, most: int, rng: random.Random) -> list[str]:
    """The tokens of a formula; it breaks off where they get more than `most`."""
    tokens: list[str] = []
    # what is still to be written, the next at the end: tokens, and names with the depth that is left to them
    waiting: list[Part] = [("formula", depth)]
    while waiting and len(tokens) <= most:
        part, left = waiting.pop()
        if left == _TOKEN:
            tokens.append(part)
            continue
        drawn = (every if left else flat)[part].draw(rng)
        waiting += [(name, _TOKEN if deeper == _TOKEN else left - deeper) for name, deeper in reversed(drawn)]
    return tokens


def _fit_brackets(tokens: Sequence[str]) -> list[str]:
    r"""Take ``\left`` and ``\right`` away around what is no taller than a line."""
    result = list(tokens)
    opened: list[int] = []
    for at, token in enumerate(tokens):
        if token.startswith(r"\left"):
            opened.append(at)
        elif token.startswith(r"\right"):
            start = opened.pop()
            plain = tokens[start].removeprefix(r"\left")
            if plain in _STRETCHED and _TALL.isdisjoint(tokens[start + 1 : at]):
                result[start], result[at] = plain, _STRETCHED[plain]
    return result


@functools.cache
def vocabulary(level: LevelName) -> list[str]:
    """All tokens that formulas of the level can have, sorted."""
    every, _ = _read_grammar(level)
    tokens = {name for rules in every.values() for parts in rules.parts for name, deeper in parts if deeper == _TOKEN}
    stretched = {token for token in tokens if token.startswith((r"\left", r"\right"))}
    plain = {token.removeprefix(r"\left") for token in stretched} & _STRETCHED.keys()
    if LEVELS[level].depth < 2:
        tokens -= stretched  # what is tall would be one part within another
    return sorted(tokens | plain | {_STRETCHED[token] for token in plain})


@functools.cache
def _read_grammar(level: LevelName) -> tuple[_Grammar, _Grammar]:
    """The rules of a level under their names: all of them, and those that go no deeper."""
    every: _Grammar = {}
    flat: _Grammar = {}
    order: list[str] = [*LEVELS]
    for line in _GRAMMAR.strip().splitlines():
        if not line.startswith(" "):
            name = line
            continue
        weight, easiest, text = line.split(maxsplit=2)
        if order.index(easiest) > order.index(level):
            continue
        texts = text.removeprefix("one of ").split() if text.startswith("one of ") else [text]
        for parts in map(_read_parts, texts):
            # the weight is that of the whole line
            share = int(weight) / len(texts)
            every.setdefault(name, _Rules()).add(parts, share)
            if all(deeper <= 0 for _, deeper in parts):
                flat.setdefault(name, _Rules()).add(parts, share)
    return every, flat


def _read_parts(text: str) -> list[Part]:
    parts: list[Part] = []
    for piece in re.findall(r"<[^ <>][^<>]*>|[^ ]+", text):
        found = re.fullmatch(r"<(\+?)([a-z0 ]+)>", piece)
        parts.append((found[2], len(found[1])) if found else (piece, _TOKEN))
    return parts
