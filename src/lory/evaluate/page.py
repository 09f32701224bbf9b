"""predictions.html: images, targets and answers side by side, worst first, in one file that needs nothing else."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Sequence

from lory.evaluate.answers import Kind, Prediction
from lory.evaluate.thumbnails import Thumbnails

MOST_ROWS = 500
"""Of each kind; predictions.jsonl has all."""

_TITLES: dict[Kind, str] = {
    "answer": "Answers, those furthest from their targets first",
    "continuation": "Continued texts, the most repetitive first",
    "record": "Records that were read only, the least expected first",
}
_SCORES = (
    "edit_distance",
    "formula_edit_distance",
    "exact_match",
    "loss",
    "token_accuracy",
    "seq_rep_1",
    "seq_rep_4",
    "diversity",
)
# Nothing is loaded and no script runs, whatever stands in a text; images are in the page
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --edge: #8884; --soft: #8881; --bad: #d33; --less: #d334; --more: #3a34; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
article { border: 1px solid var(--edge); border-radius: .5rem; margin: 1rem 0; overflow: hidden; }
header { background: var(--soft); padding: .4rem .8rem; font-size: .85rem; overflow-wrap: anywhere; }
header b { color: var(--bad); }
.prompt { padding: .5rem .8rem; border-bottom: 1px solid var(--edge); }
.both { display: grid; grid-template-columns: 1fr 1fr; }
.both.seen { grid-template-columns: 1fr 1fr 1fr; }
.both > div { padding: .5rem .8rem; min-width: 0; }
.both > div + div { border-left: 1px solid var(--edge); }
.seen pre { font-family: ui-monospace, monospace; font-size: .85rem; }
img { display: block; max-width: 100%; max-height: 20rem; margin: .2rem 0; background: white; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; max-height: 24rem; overflow-y: auto; }
h3 { font-size: .75rem; font-weight: 600; margin: 0; opacity: .7; }
del { background: var(--less); text-decoration: none; }
ins { background: var(--more); text-decoration: none; }
@media (max-width: 40rem) { .both, .both.seen { grid-template-columns: 1fr; } .both > div + div { border-left: 0; } }
"""
_MOST_COMPARED = 2000
"""Words of a text whose differences are marked; comparing takes time by the square."""


def draw_page(model: str, predictions: Sequence[Prediction], thumbnails: Thumbnails | None = None) -> str:
    """The page as a text of HTML; everything that came from data or model is escaped.

    Args:
        thumbnails: makes the images.
    """
    thumbnails = thumbnails or Thumbnails()
    title = html.escape(f"Predictions of {model}")
    parts = [
        "<!doctype html>\n<html lang='en'>\n<meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n<h1>{title}</h1>",
    ]
    for kind, heading in _TITLES.items():
        rows = sorted((p for p in predictions if p.kind == kind), key=_badness, reverse=True)
        if rows:
            parts.append(f"<h2>{heading}</h2>")
            if len(rows) > MOST_ROWS:
                parts.append(f"<p>The first {MOST_ROWS:,} of {len(rows):,}; predictions.jsonl has all.</p>")
            parts += [_draw(row, thumbnails) for row in rows[:MOST_ROWS]]
    return "\n".join(parts) + "\n</html>\n"


def _badness(prediction: Prediction) -> float:
    """The higher, the further up; comparable within a kind."""
    scores = prediction.scores
    if prediction.kind == "continuation":
        return scores["seq_rep_4"]
    if prediction.kind == "record":
        return scores["loss"]
    return scores["edit_distance"] + bool(prediction.parroting)


def _draw(prediction: Prediction, thumbnails: Thumbnails) -> str:
    scores = ", ".join(f"{name} {prediction.scores[name]:.3f}" for name in _SCORES if name in prediction.scores)
    flags = [f"parroting: {kind}" for kind in prediction.parroting] + ["cut by its length"] * prediction.cut
    marks = "".join(f" · <b>{html.escape(flag)}</b>" for flag in flags)
    head = html.escape(f"{prediction.source} · {prediction.place} · {scores}")
    prompt = _show_prompt(prediction)
    above = f"<div class='prompt'>{prompt}</div>" if prompt else ""
    columns = [("image", _show_images(prediction, thumbnails))] if prediction.images else []
    if prediction.answer is None:
        columns.append(("target", f"<pre>{html.escape(prediction.target)}</pre>"))
    else:
        target, answer = _compare(prediction.target, prediction.answer)
        columns += [("target", f"<pre>{target}</pre>"), ("answer", f"<pre>{answer}</pre>")]
    body = "".join(f"<div><h3>{name}</h3>{content}</div>" for name, content in columns)
    if len(columns) == 1:
        body = body.replace("<div>", "<div class='prompt'>", 1)
    else:
        body = f"<div class='both{' seen' * (len(columns) == 3)}'>{body}</div>"
    return f"<article><header>{head}{marks}</header>{above}{body}</article>"


def _show_images(prediction: Prediction, thumbnails: Thumbnails) -> str:
    shown = []
    for media in prediction.images:
        url, problem = thumbnails.make(media)
        shown.append(f"<img src='{html.escape(url)}' alt='image'>" if url else f"<p>{html.escape(problem)}</p>")
    return "".join(shown)


def _show_prompt(prediction: Prediction) -> str:
    if isinstance(prediction.prompt, str):
        return f"<h3>text</h3><pre>{html.escape(prediction.prompt)}</pre>" if prediction.prompt else ""
    return "".join(
        f"<h3>{html.escape(str(message['role']))}</h3><pre>{html.escape(str(message['content']))}</pre>"
        for message in prediction.prompt
    )


def _compare(target: str, answer: str) -> tuple[str, str]:
    """Both as HTML; between texts that are close, what only the one has is marked as deleted or inserted."""
    one, other = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (target, answer))
    if max(len(one), len(other)) > _MOST_COMPARED:
        return html.escape(target), html.escape(answer)
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    if matcher.ratio() < 0.6:
        return html.escape(target), html.escape(answer)
    blocks = matcher.get_opcodes()
    left = "".join(_mark(one[a:b], "del", same=kind == "equal") for kind, a, b, _, _ in blocks)
    return left, "".join(_mark(other[c:d], "ins", same=kind == "equal") for kind, _, _, c, d in blocks)


def _mark(words: Sequence[str], tag: str, same: bool) -> str:
    text = html.escape("".join(words))
    return text if same or not text else f"<{tag}>{text}</{tag}>"
