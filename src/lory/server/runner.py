"""What runs the model for a server: prompts in parts, and steps of all rows together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lory.decoding.loop import GrowingLayer
from lory.models.lean import find_decoder
from lory.models.load import first_line
from lory.runtime import UsageError, log
from lory.server.alone import AloneRow
from lory.server.bank import AdapterBank
from lory.server.rows import KeysValues, RowsCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the largest logit: more than rounding explains is another result
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 5e-2
# What a model raises that is used otherwise than it can be
_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


class Prompt:
    """A prompt that is being read.

    Attributes:
        ids: its tokens.
        adapter: the number of its adapter in the bank.
        inputs: what the model's forward is given beside the tokens, as the pixels of images.
        offset: see `AloneRow`.
        done: how many of the tokens are read.
        logits: (V,) fp32, of the token after the last; None before the end.
        cache: what was read, as keys and values.
    """

    def __init__(
        self, ids: Sequence[int], adapter: int | None = None, inputs: Mapping[str, Tensor] | None = None
    ) -> None:
        self.ids, self.adapter, self.inputs, self.offset, self.done = list(ids), adapter, inputs or {}, 0, 0
        self.logits: Tensor | None = None
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)

    def states(self) -> KeysValues:
        """What was read, for `RowsCache.join`."""
        return [(layer.keys[0], layer.values[0]) for layer in self.cache.layers]

    def start_with(self, states: KeysValues, tokens: int) -> None:
        """Take the first `tokens` tokens as read, with these keys and values."""
        for index, (keys, values) in enumerate(states):
            self.cache.update(keys[None, :, :tokens], values[None, :, :tokens], index)
        self.done = tokens


class Runner:
    """A model with the rows that it decodes; one thread at a time.

    Args:
        bank: the adapters that rows can have.
    """

    def __init__(self, model: PreTrainedModel, bank: AdapterBank | None = None) -> None:
        self.model, self.bank = model, bank
        decoder = find_decoder(model)
        self.forward: Any = bank.route(decoder) if bank is not None and decoder is not None else decoder or model
        accepts_few = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if accepts_few and decoder is None else {}
        self.rows = RowsCache()
        self.adapters: list[int | None] = []
        self.offsets: list[int] = []
        self.joins_images = True
        """Whether a prompt with images becomes a row like any other; `check_images` finds out."""

    @torch.inference_mode()
    def read(self, prompt: Prompt, tokens: int) -> None:
        """Read up to `tokens` more of a prompt; one with images is read as a whole."""
        if prompt.inputs:
            self.select(prompt.adapter)
            row = AloneRow(self.model, prompt.ids, prompt.inputs)
            prompt.cache, prompt.offset, prompt.logits, prompt.done = row.cache, row.offset, row.logits, len(prompt.ids)
            return
        logits = self._read(prompt, tokens, self.forward, self._last_only)
        if prompt.done == len(prompt.ids):
            prompt.logits = logits[0, -1].float()

    @torch.inference_mode()
    def read_with_logits(self, prompt: Prompt, tokens: int) -> Tensor:
        """Read up to `tokens` more of a prompt; the logits (tokens, V) of the token after each, fp32."""
        logits = self._read(prompt, tokens, self.model, {})[0].float()
        if prompt.done == len(prompt.ids):
            prompt.logits = logits[-1]
        return logits

    def _read(self, prompt: Prompt, tokens: int, forward: Any, arguments: dict[str, Any]) -> Tensor:
        self.select(prompt.adapter)
        end = min(prompt.done + tokens, len(prompt.ids))
        device = self.model.device
        logits: Tensor = forward(
            input_ids=torch.tensor([prompt.ids[prompt.done : end]], device=device),
            position_ids=torch.arange(prompt.done, end, device=device)[None],
            past_key_values=prompt.cache,
            use_cache=True,
            **arguments,
        ).logits
        prompt.done = end
        return logits

    def select(self, adapter: int | None) -> None:
        """The next forwards have this adapter in all of their rows."""
        if self.bank is not None:
            self.bank.select([adapter])

    @torch.inference_mode()
    def join(self, prompt: Prompt) -> None:
        """Make a row of a prompt that is read; it is the last one."""
        self.rows.join(prompt.states())
        self.adapters.append(prompt.adapter)
        self.offsets.append(prompt.offset)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Take a row out; the last one takes its place."""
        self.rows.leave(row)
        self.adapters[row], self.offsets[row] = self.adapters[-1], self.offsets[-1]
        self.adapters.pop()
        self.offsets.pop()

    @torch.inference_mode()
    def states(self, row: int) -> KeysValues:
        """A copy of a row's keys and values."""
        return self.rows.read(row)

    def clear(self) -> None:
        """Forget all rows."""
        self.rows, self.adapters, self.offsets = RowsCache(), [], []

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to each row; the logits (rows, V) of the next, fp32."""
        if self.bank is not None:
            self.bank.select(self.adapters)
        device = self.model.device
        places = [length + offset for length, offset in zip(self.rows.lengths, self.offsets, strict=True)]
        positions = torch.tensor(places, device=device)[:, None]
        mask = self.rows.begin_step()
        logits: Tensor = self.forward(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.rows,
            use_cache=True,
            **self._last_only,
        ).logits
        self.rows.end_step()
        return logits[:, -1].float()

    def check(self) -> None:
        """Make sure that rows which join and leave give what each gives alone.

        Raises:
            UsageError: they don't, as with models that keep a state other than keys and values.
        """
        name = type(self.model).__name__
        try:
            difference, largest = self._compare()
        except _FAILURES as error:
            raise UsageError(f"{name} cannot be served in batches: {first_line(error)}") from error
        limit = _TOLERANCE.get(self.model.dtype, _TOLERANCE_HALF)
        if not difference <= limit * max(largest, 1e-6):
            raise UsageError(
                f"{name} answers otherwise in a batch than alone (logits differ by {difference:.1e} of {largest:.1e}), "
                "so it cannot be served; talk to it with `lory chat`."
            )

    @torch.inference_mode()
    def check_images(self, ids: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
        """Find out with a prompt with images whether such prompts can be rows of a batch; otherwise they go alone."""
        try:
            alone, prompt, text = AloneRow(self.model, ids, inputs), Prompt(ids, None, inputs), Prompt([ids[0]] * 7)
            for one in (prompt, text):
                self.read(one, len(one.ids))
                self.join(one)
            difference = largest = 0.0
            for token in ids[:2]:
                alone.feed(token)
                together = self.step([token, token])[0]
                difference = max(difference, float((together - alone.logits).abs().max()))
                largest = max(largest, float(alone.logits.abs().max()))
        except _FAILURES as error:
            log.info("Prompts with images are answered one by one: %s", first_line(error))
            self.joins_images = False
            return
        finally:
            self.clear()
        self.joins_images = difference <= _TOLERANCE.get(self.model.dtype, _TOLERANCE_HALF) * max(largest, 1e-6)
        if not self.joins_images:
            log.info("Prompts with images are answered one by one, since in a batch the logits differ.")

    @torch.inference_mode()
    def _compare(self) -> tuple[float, float]:
        """The largest difference of logits between a batch and plain forwards, and the largest logit."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        texts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (5, 11, 7)]
        try:
            for text in texts:
                prompt = Prompt(text[:-2])
                self.read(prompt, 2)
                self.read(prompt, len(text))
                self.join(prompt)
            self.step([text[-2] for text in texts])
            self.leave(0)
            kept = [texts[2], texts[1]]
            together = self.step([text[-1] for text in kept])
        finally:
            self.clear()
        device = self.model.device
        alone = torch.stack(
            [self.model(torch.tensor([text], device=device), use_cache=False).logits[0, -1].float() for text in kept]
        )
        return float((together - alone).abs().max()), float(alone.abs().max())
