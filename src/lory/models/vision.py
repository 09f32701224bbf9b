"""The processors of models that see, loaded without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lory.runtime import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_NAMING_FILES = (*PROCESSOR_FILES, "tokenizer_config.json")


def has_processor(folder: Path) -> bool:
    """Whether the files of an image processor are in a folder."""
    return any((folder / name).exists() for name in PROCESSOR_FILES)


def build_processor(path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor in a folder around `tokenizer`, with Pillow for the images and without a part for videos."""
    from transformers import AutoImageProcessor

    kind = _images_only(_find_class(path, config))
    images = AutoImageProcessor.from_pretrained(path, backend="pil")
    given = {"tokenizer": tokenizer, "image_processor": images}
    settings, _ = kind.get_processor_dict(path)
    processor = kind.from_args_and_dict([given.get(name) for name in kind.get_attributes()], settings)
    if processor.chat_template is None:
        processor.chat_template = settings.get("chat_template")
    return processor


def _find_class(path: Path, config: PreTrainedConfig) -> Any:
    """The processor's class: as the folder's files name it, else the one that belongs to the model's config."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    for name in _NAMING_FILES:
        if (path / name).exists():
            named = read_json(path / name).get("processor_class")
            if named and (found := processor_class_from_name(named)):
                return found
    return PROCESSOR_MAPPING[type(config)]


def _images_only(kind: Any) -> Any:
    """`kind` that does without the parts for videos and sounds, whose loading would need torchvision."""

    class ImagesOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    # saved files name the class by this
    ImagesOnly.__name__ = kind.__name__
    return ImagesOnly
