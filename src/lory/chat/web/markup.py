"""Texts made fit for a page: what a model says is shown, and is never a part of the page's own HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lory.chat.review import Reviewed, ReviewItem, find_repeats
from lory.chat.web.answers import Answer, judge
from lory.chat.web.progress import RunState, Sample

# What Markdown surely takes as code, where HTML is text already: a fence up to its end, one within a list whose lines
# are all indented like it (and, indented by 4, none is blank), and spans between as many backticks on one line. Code
# that is missed shows "&lt;"; what was taken for code and is none would be HTML that is applied.
_CODE = re.compile(
    r"^(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*\n.*?(?:^(?P=fence)[`~]*[ \t]*$|\Z)"
    r"|^(?P<near> {1,3})(?P<inner>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*\n(?:(?P=near)[^\n]*\n|[ \t]*\n)*?"
    r"(?P=near)(?P=inner)[`~]*[ \t]*$"
    r"|^(?P<far> {4,})(?P<deep>`{3,}(?=[^`\n]*$))[^\n]*\n(?:(?P=far)[^\n]*\S[^\n]*\n)*?(?P=far)(?P=deep)[ \t]*$"
    r"|(?<![`\\])(?P<span>`+)(?!`)[^\n]*?(?<!`)(?P=span)(?!`)",
    re.DOTALL | re.MULTILINE,
)
_ENTITY = re.compile(r"&(?=#?\w+;)")
_ENDINGS = {"length": "cut at the longest length", "repetition": "ended since it went round in circles"}


def to_markdown(text: str) -> str:
    """Markdown that shows a text's HTML tags in place of applying them; `from_markdown` takes it back."""
    return _change_prose(text, lambda prose: _ENTITY.sub("&amp;", prose).replace("<", "&lt;"))


def from_markdown(text: str) -> str:
    """The text that `to_markdown` was given."""
    return _change_prose(text, lambda prose: prose.replace("&lt;", "<").replace("&amp;", "&"))


def _change_prose(text: str, change: Callable[[str], str]) -> str:
    """The text with what is not code changed."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def show_badge(answer: Answer | None, model: str = "") -> str:
    """How much an answer repeats itself, as HTML; empty for none."""
    if answer is None or not answer.tokens:
        return ""
    level, words = judge(answer.scores)
    speed = answer.tokens / answer.seconds if answer.seconds > 0 else 0.0
    rate = f" · {speed:.{0 if speed >= 10 else 1}f} tokens/s" if speed else ""
    ending = "" if answer.ending in ("", "stop") else f" · {_ENDINGS.get(answer.ending, answer.ending)}"
    scores = f"seq-rep-4 {answer.scores['seq_rep_4']:.2f} · diversity {answer.scores['diversity']:.2f}"
    name = f"{html.escape(model)} · " if model else ""
    return (
        f'<div class="lory-badge lory-{level}"><b>{words}</b> '
        f"<span>{name}{scores} · {answer.tokens} tokens{rate}{html.escape(ending)}</span></div>"
    )


def show_item(item: ReviewItem) -> str:
    """An answer to be reviewed, as HTML, with what it says again and again marked."""
    about = " · ".join(part for part in (item.reason, item.model, item.time) if part)
    scores = " · ".join(f"{name} {value:.3g}" for name, value in item.scores.items())
    lines = "".join(f'<p class="lory-about">{html.escape(line)}</p>' for line in (about, scores) if line)
    turns = "".join(_show_turn(str(message["role"]), _text_of(message["content"])) for message in item.prompt)
    return f'<div class="lory-item">{lines}{turns}{_show_turn("answer", mark_repeats(item.answer), raw=True)}</div>'


def mark_repeats(answer: str) -> str:
    """The answer as HTML, with marks around what it says again and again."""
    parts, end = [], 0
    for start, stop in find_repeats(answer):
        if start < end:
            continue
        parts.append(f"{html.escape(answer[end:start])}<mark>{html.escape(answer[start:stop])}</mark>")
        end = stop
    return "".join(parts) + html.escape(answer[end:])


def show_counts(reviewed: Sequence[Reviewed]) -> str:
    """How many answers were decided in what way, in words."""
    names = {None: "to review", "accept": "accepted", "edit": "edited", "reject": "rejected"}
    counts = {key: sum(one.decision == key for one in reviewed) for key in names}
    return ", ".join(f"{counts[key]} {name}" for key, name in names.items())


def _show_turn(role: str, text: str, raw: bool = False) -> str:
    body = text if raw else html.escape(text)
    return f'<div class="lory-turn"><b>{html.escape(role)}</b><div>{body}</div></div>'


def _text_of(content: Any) -> str:
    """The text of a message's content, with a word for each picture."""
    if isinstance(content, str):
        return content
    parts: Sequence[Any] = content if isinstance(content, list | tuple) else [content]
    return "\n".join(
        str(part.get("text") or f"[{part.get('type')}]") if isinstance(part, Mapping) else str(part) for part in parts
    )


def show_status(state: RunState | None, problem: str = "") -> str:
    """How a run stands, as HTML."""
    if state is None:
        return f'<div class="lory-run"><p>{html.escape(problem)}</p></div>'
    last = state.last
    facts = [f"step {state.step}" + (f" of {state.steps}" if state.steps else "")]
    for name, words, form in (
        ("loss", "loss", ".3f"),
        ("token_accuracy", "token accuracy", ".1%"),
        ("learning_rate", "learning rate", ".1e"),
        ("tokens_per_second", "tokens/s", ".0f"),
    ):
        if isinstance(value := last.get(name), int | float):
            facts.append(f"{words} {value:{form}}")
    for name, words in (("elapsed_seconds", "since the start"), ("remaining_seconds", "left")):
        if isinstance(value := last.get(name), int | float):
            facts.append(f"{format_clock(value)} {words}")
    percent = 100 * state.share
    return (
        f'<div class="lory-run"><p><b>{html.escape(state.folder.name)}</b> · {html.escape(state.status)}</p>'
        f'<div class="lory-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}" aria-label="Steps done"><div style="width: {percent:.1f}%"></div></div>'
        f"<p>{html.escape(' · '.join(facts))}</p></div>"
    )


def format_clock(seconds: float) -> str:
    """Seconds as ``1:02:03``, or ``2:03`` below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def show_chats(chats: Mapping[str, Sequence[Sample]]) -> str:
    """A run's sample chats as HTML: for each prompt the newest answer, and the earlier ones folded away."""
    parts = []
    for prompt, samples in chats.items():
        newest, *earlier = samples
        older = "".join(_show_sample(sample) for sample in earlier)
        folded = f"<details><summary>{len(earlier)} earlier</summary>{older}</details>" if earlier else ""
        parts.append(f'<div class="lory-sample"><h4>{html.escape(prompt)}</h4>{_show_sample(newest)}{folded}</div>')
    return "".join(parts)


def _show_sample(sample: Sample) -> str:
    level, words = judge(sample.scores)
    score = sample.scores.get("seq_rep_4", 0.0)
    return (
        f'<div class="lory-turn"><b>step {sample.step}</b><div>{html.escape(sample.answer)} '
        f'<span class="lory-badge lory-{level}">{words} · seq-rep-4 {score:.2f}</span></div></div>'
    )
