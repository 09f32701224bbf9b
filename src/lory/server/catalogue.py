"""The models that a server has by name: the base, and adapters on it, each with its own tokenizer."""

from __future__ import annotations

import itertools
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lory.adapters import kinds
from lory.adapters.files import read_adapter_config
from lory.adapters.prompt import is_soft_prompt
from lory.assistant import check_device, load_reader
from lory.data.encoding.named_templates import add_answer_end
from lory.data.vision.reader import ImageReader, write_prompt
from lory.generate import GenerationOptions, default_options
from lory.models.lean import prepare_for_decoding
from lory.models.load import DtypeName, load_model, load_tokenizer, terminators
from lory.models.quantize import Quantization
from lory.models.resolve import Resolved, resolve
from lory.runtime import UsageError, log
from lory.server.address import name_model
from lory.server.bank import Adapter, AdapterBank, read_adapter
from lory.server.runner import Runner
from lory.types import Media, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# of a model that names none
_ANY_CONTEXT = 2**17


@dataclass(frozen=True)
class Served:
    """A model that requests can name."""

    name: str
    adapter: int | None
    tokenizer: PreTrainedTokenizerBase
    """For prompts and replies; the engine's thread has its own, so that neither waits for the other."""
    engine_tokenizer: PreTrainedTokenizerBase
    terminators: frozenset[int]
    options: GenerationOptions
    """What a request leaves out."""
    vocabulary: int
    """Tokens that the model knows."""
    context: int
    """The most tokens of prompt and answer together."""
    reader: ImageReader | None = None
    """What prepares images, with a tokenizer of its own; None: the model reads text only."""
    created: int = field(default_factory=lambda: int(time.time()))


class Catalogue:
    """The models by name; the base is the first.

    Args:
        base: the name of the model without an adapter.
        bank: where adapters are put; None: there can be none.
    """

    def __init__(
        self, model: PreTrainedModel, resolved: Resolved, base: str, bank: AdapterBank | None, trust: bool = False
    ) -> None:
        self.model, self.bank = model, bank
        self._trust, self._resolved = trust, resolved
        self._options = default_options(model)
        if self._options.on_loop in ("back_up", "retry"):
            log.warning("on_loop is %s in the model's own options; a server takes stop.", self._options.on_loop)
            self._options = self._options.model_copy(update={"on_loop": "stop"})
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._served: dict[str, Served] = {}
        self.base = base
        self.add(base, None, resolved)

    @property
    def sees_images(self) -> bool:
        """Whether messages may have images."""
        return self._served[self.base].reader is not None

    def list(self) -> list[Served]:
        """All models."""
        return list(self._served.values())

    def find(self, name: str | None) -> Served | None:
        """The model of this name; of no name, the base."""
        return self._served.get(self.base if name is None else name)

    def read(self, name: str, folder: Path) -> tuple[Adapter, Resolved]:
        """An adapter's weights, and where its tokenizer is.

        Raises:
            UsageError: the name is taken, or the adapter can't be served (see `read_adapter`).
        """
        self._check_free(name)
        if self.bank is None:
            raise UsageError("This server was started without adapters, and takes none.")
        # which says no of a name that is too long, where Path.exists raises
        if not os.path.exists(folder / "adapter_config.json"):
            raise UsageError(f"{folder} has no adapter_config.json; it is not an adapter's folder.")
        adapter = read_adapter(self.model, folder)
        if (made_on := read_adapter_config(folder).get("base_model_name_or_path")) != self._resolved.base:
            log.warning("The adapter '%s' was made on '%s'; it fits '%s', too.", name, made_on, self._resolved.base)
        return adapter, Resolved(name, self._resolved.base, self._resolved.base_path, folder)

    def next_number(self) -> int:
        """A number for an adapter in the bank."""
        return next(self._numbers)

    def add(self, name: str, adapter: int | None, resolved: Resolved) -> Served:
        """Serve a model, whose adapter is in the bank, under a name.

        Raises:
            UsageError: the name is taken, or the tokenizer does not fit the model.
        """
        prompts, engine = (load_tokenizer(resolved, self._trust) for _ in range(2))
        # the first call takes back a cut or padding that was saved with it; later ones change nothing in it
        prompts("")
        rows = self.model.get_input_embeddings().weight.shape[0]
        if len(prompts) > rows:
            raise UsageError(
                f"The tokenizer of '{name}' has {len(prompts)} tokens and the model {rows}; merge it with `lory merge`."
            )
        ends = frozenset(add_answer_end(terminators(self.model.generation_config, prompts), prompts))
        reader = load_reader(resolved, prompts, self._trust)
        if reader is not None:
            # images are prepared in other threads than prompts
            reader = load_reader(resolved, load_tokenizer(resolved, self._trust), self._trust)
        with self._lock:
            self._check_free(name)
            context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or _ANY_CONTEXT
            served = Served(name, adapter, prompts, engine, ends, self._options, rows, context, reader)
            self._served[name] = served
        return served

    def remove(self, name: str) -> Served | None:
        """Serve an adapter no longer; None: there is no adapter of this name."""
        with self._lock:
            if name == self.base:
                return None
            return self._served.pop(name, None)

    def _check_free(self, name: str) -> None:
        if name in self._served:
            raise UsageError(f"A model is already called '{name}'; choose another name.")


def open_catalogue(
    model: str,
    adapters: dict[str, str],
    name: str | None = None,
    places: int = 8,
    changes: bool = False,
    dtype: DtypeName = "auto",
    device: str | None = None,
    quantize: Quantization | None = None,
    trust_remote_code: bool = False,
) -> tuple[Catalogue, Runner]:
    """Load a model and adapters on it, ready to be served.

    Args:
        model: a MODEL; where it is an adapter, this is served alone, as part of the model.
        adapters: names and MODELs of adapters on it.
        name: what the model is called; by default the last part of `model`.
        places: the most adapters that are decoded together.
        changes: adapters can be added later.

    Raises:
        UsageError: one of them can't be loaded or served.
    """
    resolved = resolve(model)
    many = bool(adapters) or changes
    if resolved.adapter and many:
        raise UsageError(
            f"'{model}' is an adapter itself; give its base, '{resolved.base}', and the adapter with --adapter."
        )
    if resolved.adapter and is_soft_prompt(resolved.adapter):
        raise UsageError(f"'{model}' is a soft prompt, which cannot be served; talk to it with `lory chat`.")
    place = check_device(device) if device else None
    loaded = load_model(resolved, dtype, place, trust_remote_code, quantize)
    if resolved.adapter:
        kinds.load(loaded, resolved.adapter)
    log.info("%s", prepare_for_decoding(loaded))
    bank = AdapterBank(loaded, places) if many else None
    runner = Runner(loaded, bank)
    runner.check()
    catalogue = Catalogue(loaded, resolved, name or name_model(model), bank, trust_remote_code)
    _check_images(catalogue, runner)
    if bank is not None:
        _add_adapters(catalogue, bank, adapters)
    return catalogue, runner


def _check_images(catalogue: Catalogue, runner: Runner) -> None:
    """Find out whether prompts with images can be batched, with a picture of two colours."""
    from PIL import Image

    served = catalogue.list()[0]
    if served.reader is None:
        return
    image = Image.new("RGB", (96, 64), "white")
    image.paste((200, 30, 60), (20, 10, 60, 50))
    message = Message("user", "<image>What is this?", (Media("image", ""),))
    prompt = write_prompt(served.tokenizer, served.reader, [message], served.reader.see([image]))
    runner.check_images(prompt.ids, prompt.inputs)


def _add_adapters(catalogue: Catalogue, bank: AdapterBank, adapters: dict[str, str]) -> None:
    for name, path in adapters.items():
        found = resolve(path).adapter
        if found is None:
            raise UsageError(f"'{path}' was given as an adapter, but is a whole model; serve it as MODEL.")
        adapter, parts = catalogue.read(name, found)
        number = catalogue.next_number()
        bank.add(number, adapter)
        catalogue.add(name, number, parts)
