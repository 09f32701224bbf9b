"""Chat templates for tokenizers without one of their own: bundled ones by name, and a user's own files."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.data.encoding.templates import MARK, tokenize
from lory.runtime import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
"""In a config: the tokenizer's own template."""
MAX_BYTES = 200_000
"""The largest templates of known models have 20,000."""

_FOLDER = "chat_templates"
_ALIASES = {"qwen": "chatml", "yi": "chatml", "internlm": "internlm2", "phi": "phi3", "deepseek-v2": "deepseek"}
# parts of a model's name or type, the more special first, and the template that its family uses
_FAMILIES = {
    "vicuna": "vicuna",
    "zephyr": "zephyr",
    "tinyllama": "zephyr",
    "alpaca": "alpaca",
    "hermes": "hermes",
    "qwen": "chatml",
    "yi-": "chatml",
    "internlm": "internlm2",
    "deepseek": "deepseek",
    "baichuan": "baichuan2",
    "chatglm": "chatglm3",
    "glm": "glm4",
    "gemma": "gemma",
    "phi": "phi3",
    "mistral": "mistral",
    "mixtral": "mistral",
    "llama-3": "llama3",
    "llama3": "llama3",
    "llama": "llama2",
}
_TEXTS = {"bos_token": "<bos>", "eos_token": "<eos>"}
_MARKS = re.compile(r"(?<!<)<[^\s<>]{1,40}>(?!>)|\[gMASK\]")


def list_templates() -> dict[str, str]:
    """The bundled templates' names, each with its note: whose it is, and what ends an answer."""
    folder = resources.files("lory.data").joinpath(_FOLDER)
    names = sorted(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))
    return {name: _read_note(folder.joinpath(f"{name}.jinja").read_text("utf-8")) for name in names}


def _read_note(text: str) -> str:
    """The comment that each of the bundled templates begins with, as one line."""
    return " ".join(text[text.index("{#-") + 3 : text.index("-#}")].split())


def find_template(name_or_path: str) -> str:
    """The text of a bundled template, or of a user's own file that ends in .jinja.

    Raises:
        UsageError: there is no such template or file, or what is there is no chat template (see `check_template`).
    """
    name = _ALIASES.get(name_or_path.lower(), name_or_path.lower())
    if name in (bundled := list_templates()):
        return resources.files("lory.data").joinpath(_FOLDER).joinpath(f"{name}.jinja").read_text("utf-8")
    path = Path(name_or_path).expanduser()
    if path.suffix != ".jinja":
        near = difflib.get_close_matches(name, [*bundled, *_ALIASES, AUTO], n=1)
        remedy = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            f"'{name_or_path}' is no chat template; {remedy}give the path of a .jinja file, or one of {_names()}."
        )
    text = _read(path)
    check_template(text, str(path))
    return text


def _names() -> str:
    return ", ".join([AUTO, *list_templates()])


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise UsageError(f"{path} {what}; give the path of a .jinja file, or one of {_names()}.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UsageError(f"{path} has {size} bytes; a chat template has at most {MAX_BYTES}.")
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text, as a chat template has to be.") from error
    except OSError as error:
        raise UsageError(f"{path} could not be read: {error.strerror}.") from error


def check_template(template: str, where: str) -> None:
    """Compile a template in jinja's sandbox, as transformers does, and render a short conversation with it.

    Raises:
        UsageError: its syntax is wrong, it fails, or it leaves out a question or an answer; `where` names it.
    """
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [("user", "first question"), ("assistant", "first answer"), ("user", "second question")]
    trial = [{"role": role, "content": content} for role, content in turns]
    try:
        rendered: list[str] = render_jinja_template(
            conversations=[trial], chat_template=template, add_generation_prompt=True, **_TEXTS
        )[0]
    except TemplateSyntaxError as error:
        raise UsageError(
            f"{where}, line {error.lineno} is no valid jinja: {(error.message or '').rstrip('.')}."
        ) from error
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"{where} fails on a conversation of user, assistant, user: {str(error).rstrip('.')}."
        ) from error
    if lost := next((content for _, content in turns if content not in rendered[0]), None):
        raise UsageError(f"{where} is no chat template: of a trial conversation it leaves out the {lost}.")


def choose_template(
    tokenizer: PreTrainedTokenizerBase, template: str = AUTO, name: str = "", model_type: str = ""
) -> list[str]:
    """Give the tokenizer the template that the config names; `auto` keeps its own.

    Args:
        template: `auto`, a bundled template's name, or the path of a .jinja file.
        name, model_type: the base model's name, and its type in config.json: for a guess where there is no template.

    Returns:
        Notes for the user (see `set_template`).

    Raises:
        UsageError: there is no such template, it does not fit the tokenizer, or `auto` finds none.
    """
    if template != AUTO:
        return set_template(tokenizer, find_template(template))
    if tokenizer.chat_template:
        return []
    name = name or tokenizer.name_or_path
    guess = guess_template(name, model_type)
    remedy = f"'{guess}' looks like its family's; " if guess else ""
    raise UsageError(
        f"The tokenizer of {name} has no chat template; {remedy}name one of {', '.join(list_templates())}, "
        "or give the path of a .jinja file."
    )


def guess_template(name: str, model_type: str = "") -> str | None:
    """The template that a model of this name (a folder or hub id) or type most likely uses; None: no idea."""
    for text in (re.split(r"[\\/]", name.rstrip("\\/"))[-1].lower(), model_type.lower()):
        # a part may end inside a word (qwen2), but not begin there (dolphin is no phi)
        found = (family for part, family in _FAMILIES.items() if re.search(rf"(?<![a-z]){part}", text))
        if family := next(found, None):
            return family
    return None


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Give the tokenizer this template, and make the token that it ends an answer with the end of sequence.

    The end has to be one token, since generation stops at tokens; the marks of the roles need not be. Where the
    template itself uses the end of sequence (for something else), that stays as it is; see `answer_end`.

    Returns:
        A note for each thing that is otherwise than the user may expect.

    Raises:
        UsageError: it is no template, or ends an answer with a text that is not a token of this tokenizer. The
            tokenizer is left as it was.
    """
    check_template(template, "The template")
    closing = _closing(tokenizer, template)
    end = _end_token(tokenizer, closing)
    if closing.strip() and not end:
        raise UsageError(_explain_missing_end(tokenizer, closing.strip()))
    if not closing.strip() and tokenizer.eos_token_id is None:
        raise UsageError("The template writes no end of an answer, and the tokenizer names no end of sequence.")
    notes = []
    if end and end[0] != tokenizer.eos_token_id and "eos_token" not in template:
        notes.append(f"The template ends answers with {end[1]}, which is now the end of sequence.")
        tokenizer.eos_token = end[1]
    tokenizer.chat_template = template
    marks = dict.fromkeys(_MARKS.findall(_trial(tokenizer, template)))
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if unknown := [mark for mark in marks if mark not in added]:
        notes.append(f"{', '.join(unknown)} in the template: no tokens of this tokenizer; encoded as plain text.")
    return notes


def _explain_missing_end(tokenizer: PreTrainedTokenizerBase, closing: str) -> str:
    pieces = len(tokenize(tokenizer, closing))
    own = f"ends with {tokenizer.eos_token}, the tokenizer's own end, such as alpaca" if tokenizer.eos_token else ""
    return (
        f"The template ends an answer with '{closing}', which is not a token of this tokenizer (but {pieces} of them), "
        f"so generation could not stop there; take a template that {own or 'ends with a token of it'}."
    )


def answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer's template writes after an answer; None: it has no template, or that writes none.

    It belongs to the terminators, whatever generation_config.json says: base models with a chat template often have
    another end of sequence.
    """
    if not tokenizer.chat_template:
        return None
    end = _end_token(tokenizer, _closing(tokenizer, None))
    return end[0] if end else None


def add_answer_end(terminators: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The terminators with `answer_end`, last, so that training teaches and generation heeds the template's own end."""
    end = answer_end(tokenizer)
    return terminators if end is None or end in terminators else (*terminators, end)


def _closing(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """What a template (None: the tokenizer's own) writes after an answer."""
    return _trial(tokenizer, template).rpartition(MARK)[2]


def _trial(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    from jinja2 import TemplateError

    texts: list[Any] = ["?", MARK]
    for contents in (texts, [[{"type": "text", "text": text}] for text in texts]):
        trial = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=True)]
        try:
            text: str = tokenizer.apply_chat_template(trial, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            continue  # it may take the other form of contents; what it takes at all is told by check_template
        if MARK in text:
            return text
    return ""


def _end_token(tokenizer: PreTrainedTokenizerBase, closing: str) -> tuple[int, str] | None:
    """The added token that the text after an answer begins with (but for blanks), as id and text."""
    added = tokenizer.added_tokens_decoder
    found = ((token, added[token].content) for token in tokenize(tokenizer, closing) if token in added)
    return next(((token, text) for token, text in found if text.strip() and closing.lstrip().startswith(text)), None)
