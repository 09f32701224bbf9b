"""Where a model folder keeps what the loaded model has: transformers renames, stacks and fuses tensors as it loads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Piece:
    """What one stored tensor is of a parameter: all of it, one expert of it, or some of its (or the expert's) rows."""

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def cut(self, tensor: Tensor) -> Tensor:
        """This piece of the whole parameter, or of its B, whose rows are the same."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.rows is None else tensor[slice(*self.rows)]


@dataclass(frozen=True)
class Layout:
    """A model folder as transformers would load it.

    Attributes:
        model: the model without its weights (on the meta device); None where only its own code could make it.
        pieces: what each stored tensor is; one that loading ignores, or takes apart in other ways, is left out.
        ties: parameters that loading makes the same as others, by the former's name.
    """

    model: PreTrainedModel | None
    pieces: dict[str, Piece]
    ties: dict[str, str] = field(default_factory=dict)

    def stored(self, parameter: str) -> list[str]:
        """Names of the tensors that make up a parameter."""
        return [name for name, piece in self.pieces.items() if piece.parameter == parameter]


def read_layout(base: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of a model folder whose config.json and stored shapes are known."""
    model = _make_empty(base, config)
    if model is None:
        return Layout(None, {name: Piece(name) for name in shapes})
    return Layout(model, _find_pieces(model, shapes), dict(model.all_tied_weights_keys))


def _make_empty(base: Path, config: Mapping[str, Any]) -> PreTrainedModel | None:
    import transformers
    from transformers.initialization import no_init_weights

    try:
        settings = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (ValueError, OSError, KeyError):
        return None
    # the class that wrote the folder; without a word of it, what a chat would load
    names = config.get("architectures") or [transformers.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(settings.model_type, "")]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        return None
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class(settings)
    return model


def find_name(model: nn.Module, name: str, known: Mapping[str, Tensor]) -> str:
    """What a tensor's name in a checkpoint of the same architecture is in `model`, whose names are `known`.

    Older transformers had other module paths for many models, and adapters were trained under them.
    """
    from transformers import PreTrainedModel

    if name in known or not isinstance(model, PreTrainedModel):
        return name
    return _translate(name, _list_conversions(model)[0], [], model.base_model_prefix, known)[0]


def _list_conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' renamings, and its conversions that do more than that."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    return renamings, [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]


def _translate(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, known: Mapping[str, Tensor]
) -> tuple[str, str | None]:
    """The parameter a stored name leads to and the conversion's pattern, by transformers' own rules."""
    from transformers.core_model_loading import rename_source_key

    parameter, pattern = rename_source_key(name, renamings, converters, prefix, known)
    if parameter not in known and name in known:
        parameter, pattern = rename_source_key(name, [], [], prefix, known)
    return parameter, pattern


def _find_pieces(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    from transformers.core_model_loading import dot_natural_key

    renamings, converters = _list_conversions(model)
    known, prefix = model.state_dict(), model.base_model_prefix
    pieces: dict[str, Piece] = {}
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    # the order in which transformers stacks experts
    for name in sorted(shapes, key=dot_natural_key):
        parameter, pattern = _translate(name, renamings, converters, prefix, known)
        if parameter not in known:
            continue
        if pattern is None:
            pieces[name] = Piece(parameter)
        else:
            parts[parameter][pattern].append(name)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for parameter, names in parts.items():
        pieces |= _split(parameter, by_pattern[next(iter(names))], names, shapes)
    return pieces


def _split(
    parameter: str, converter: Any, names: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Piece]:
    """The pieces of a parameter that is made by stacking experts or joining rows; none where it is made otherwise."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    stacked = steps[:1] == [("MergeModulelist", 0)]
    joined = steps[int(stacked) :] == [("Concatenate", int(stacked))]
    if len(converter.target_patterns) != 1 or not (joined or (stacked and len(steps) == 1)):
        return {}
    pieces = {}
    start = 0
    for pattern in converter.source_patterns:
        own = names.get(pattern, [])
        if not own:
            return {}
        stop = start + shapes[own[0]][0]
        for index, name in enumerate(own):
            pieces[name] = Piece(parameter, index if stacked else None, (start, stop) if joined else None)
        start = stop
    return pieces
