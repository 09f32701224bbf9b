"""A small Qwen2-VL to be trained from scratch on formulas: its real classes, random weights and its own vocabulary.

python -m examples.formulas.base DIR
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from lory.data.making.formula_grammar import vocabulary
from lory.runtime import UsageError, write_json

QUESTION = "Using LaTeX to perform OCR on the image."
"""What the registry's LaTeX_OCR asks. A single token here, since each token would cost time in every step."""
TERSE_QUESTION = "Write the image in LaTeX without spaces."
"""The base model learns both ways of writing, as large ones do, each for its question; a token, too."""

PATCH, MERGE = 14, 2
MOST_PIXELS = 100 * (PATCH * MERGE) ** 2
"""100 tokens; of 180 typeset formulas of the medium level half take 26 or less, and 1 in 100 more than 88."""

# what stands between special tokens is read character by character, but for LaTeX's commands
END_OF_TEXT, END, IMAGE = "<|endoftext|>", "<|end|>", "<|image_pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
UNKNOWN = "<unk>"
PIECE = r"\\[A-Za-z]+|\\.|[\s\S]"
# a space belongs to what follows it: half as many tokens as with spaces by themselves, and the token before the next
# one is a symbol, which should help the model to find its place in the picture
SINGLE = r" ?(?:\\[A-Za-z]+|\\.|\S)|\s"
OPENING = re.findall(
    r"\\\w+", r"\frac \sqrt \binom \hat \bar \vec \tilde \dot \ddot \overline \widehat \mathrm \mathcal \mathbf \mathbb"
)
"""Commands whose argument begins right after them."""

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def list_pieces() -> list[str]:
    """What text is made of: printable ASCII and every command of the grammar."""
    commands = {piece for token in vocabulary("hard") for piece in re.findall(PIECE, token) if len(piece) > 1}
    return ["\n", *map(chr, range(32, 127)), *sorted(commands)]


def list_phrases() -> list[str]:
    """Pieces that always or often come together, longest first; as single tokens they save 15 to 19% of a formula's."""
    phrases = [["_", "{"], ["^", "{"], ["}", "{"], ["}", "_", "{"], ["}", "^", "{"], *([c, "{"] for c in OPENING)]
    written = {text for phrase in phrases for text in ("".join(phrase), " ".join(phrase), " " + " ".join(phrase))}
    # \left( and the like have no space inside in either way of writing
    brackets = {token for token in vocabulary("hard") if re.match(r"\\(left|right)", token)}
    return sorted(written | brackets | {f" {token}" for token in brackets}, key=lambda text: (-len(text), text))


def build_tokenizer() -> Any:
    """A tokenizer with one token for a character, command or phrase, each with and without a space before it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, END, *ROLES, *VISION, IMAGE, UNKNOWN]
    pieces, phrases = list_pieces(), list_phrases()
    spaced = [f" {piece}" for piece in pieces if not piece.isspace()]
    words = [*special, QUESTION, TERSE_QUESTION, *pieces, *spaced, *phrases]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    token = "|".join([*map(re.escape, phrases), SINGLE])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(token), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(question, normalized=False) for question in (QUESTION, TERSE_QUESTION)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, width: int = 256, layers: int = 4, vision_width: int = 192, depth: int = 2) -> Any:
    """A Qwen2-VL with random weights: 5.1 million of them by default.

    Args:
        width: of the language model, in heads of 64.
        vision_width: of the vision tower, in heads of 32.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = dict(zip([IMAGE, *VISION], tokenizer.convert_tokens_to_ids([IMAGE, *VISION]), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 1024,
        # a formula is at most some 40 tokens wide: slower waves than these could not tell its columns apart
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 8, 16]},
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": depth,
        "embed_dim": vision_width,
        "hidden_size": width,
        "num_heads": vision_width // 32,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        # pictures are no films: the same picture twice would only double the work
        "temporal_patch_size": 1,
        # a CPU takes longer for quick_gelu's exponentials than for the products around them
        "hidden_act": "relu",
        "initializer_range": 0.05,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 256
    return model


def write_base(folder: Path, seed: int = 0, **sizes: int) -> Any:
    """Write model, tokenizer and processor settings into `folder`, and give the model back.

    Raises:
        UsageError: the folder is there and not empty.
    """
    import torch

    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists already; delete it first, or choose another folder.")
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = build_model(tokenizer, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "processor_config.json", {"processor_class": "Qwen2VLProcessor"})
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 1,
        "size": {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": MOST_PIXELS},
        # paper is about 0, so that empty patches say nothing
        "image_mean": [0.9, 0.9, 0.9],
        "image_std": [0.25, 0.25, 0.25],
    }
    write_json(folder / "preprocessor_config.json", images)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = write_base(given.folder, given.seed)
    print(f"{given.folder}: a Qwen2-VL of {model.num_parameters() / 1e6:.1f} million random weights")


if __name__ == "__main__":
    main()
