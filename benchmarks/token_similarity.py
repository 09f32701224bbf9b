"""A picture of how alike a text's tokens are to a model: before and after SimCTG, say.

    python -m benchmarks.token_similarity smollm2 runs/simctg --data FILE [--tokens 64] [--output PNG] [--json]

The cosine similarity of the last layer's states of any two tokens of the text, as in figure 1 of Su et al. 2022 (arXiv
2202.06417), one square a MODEL. Where all tokens are alike, contrastive search has little to tell them apart by. The
mean is over pairs of different tokens, and over as many stretches of the file as --texts says; the first is drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def measure_similarity(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """(T, T) cosine similarity of the last layer's states, as they go into the head, of T tokens."""
    states = model.get_decoder()(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0]
    directions = F.normalize(states.float(), dim=-1)
    return (directions @ directions.T).cpu()


def mean_similarity(similarity: Tensor) -> float:
    """The mean over pairs of different tokens, of (T, T)."""
    tokens = len(similarity)
    return float((similarity.sum() - similarity.diagonal().sum()) / (tokens * (tokens - 1)))


def draw_similarity(matrices: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG of the matrices side by side, in one scale of colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(matrices) + 0.8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_title(f"{name}: mean {mean_similarity(matrix):.2f}")
        axis.set_xlabel("token")
    axes[0].set_ylabel("token")
    figure.colorbar(image, ax=list(axes), label="cosine similarity", shrink=0.85)
    # the layout leaves the titles too little room
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="what `lory chat` takes")
    parser.add_argument("--names", nargs="*", help="their titles in the picture; by default as they were given")
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, default=8, help="equal stretches of the file whose beginnings are taken")
    parser.add_argument("--output", type=Path, default=Path("similarity.png"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.names or options.models
    if len(names) != len(options.models) or options.texts < 1 or options.tokens < 2:
        parser.error("give one name a MODEL, 1 or more texts, and 2 or more tokens")

    from benchmarks.contrastive import read_prefixes

    import lory

    matrices, means = {}, {}
    for name, path in zip(names, options.models, strict=True):
        assistant = lory.load(path)
        texts = read_prefixes(options.data, options.texts, assistant.tokenizer, options.tokens).tolist()
        every = [measure_similarity(assistant.model, ids) for ids in texts]
        matrices[name] = every[0]
        means[name] = sum(map(mean_similarity, every)) / len(every)
    draw_similarity(matrices, options.output)
    if options.json:
        print(json.dumps(means))
        return
    for name, mean in means.items():
        print(f"{name}: mean similarity {mean:.3f} over {options.texts} texts of {options.tokens} tokens")
    print(f"The picture is {options.output}.")


if __name__ == "__main__":
    main()
