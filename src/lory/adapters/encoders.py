"""What a soft prompt learns: a table of vectors, or a small network that produces one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from lory.config import Section

Kind = Literal["prompt", "ptuning", "prefix"]


class PromptConfig(Section):
    """A soft prompt: vectors before every text, which are all that is trained; the model itself stays as it is."""

    type: Kind = Field(
        "prompt",
        description="prompt (prompt tuning: embeddings of virtual tokens), ptuning (P-tuning: a network produces them) "
        "or prefix (prefix tuning: keys and values in every layer).",
    )
    virtual_tokens: int = Field(20, ge=1, description="Length of the soft prompt, in tokens.")
    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary",
        description="How prompt tuning starts: vocabulary (embeddings of random tokens), text (those of init_text) or "
        "random (normally distributed). P-tuning and prefix tuning always start at random.",
    )
    init_text: str | None = Field(
        None, min_length=1, description="Text whose tokens, cut or repeated, start the prompt; an instruction is good."
    )
    encoder: Literal["mlp", "lstm"] = Field(
        "mlp", description="P-tuning's network: mlp (three layers) or lstm (in both directions, and two layers)."
    )
    encoder_hidden_size: int | None = Field(
        None, ge=1, description="Width of P-tuning's network or prefix tuning's projection; null is the prompt's own."
    )
    encoder_layers: int = Field(2, ge=1, description="Layers of P-tuning's lstm.")
    encoder_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout between the layers of P-tuning's lstm.")
    projection: bool = Field(
        False, description="Prefix tuning: a network of two layers produces the prefix, which trains more steadily."
    )

    @model_validator(mode="after")
    def _check(self) -> PromptConfig:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init text and init_text belong together; give both or neither")
        if self.init == "text" and self.type != "prompt":
            raise ValueError(f"init text is for type prompt, and type is {self.type}")
        if self.projection and self.type != "prefix":
            raise ValueError(f"projection is for type prefix, and type is {self.type}")
        return self


class SoftPrompt(nn.Module):
    """Vectors (tokens, size) that are learnt as they are.

    Parameter names are PEFT's. With a `config` that asks for a network, this is what that one came to.
    """

    def __init__(self, config: PromptConfig, size: int, inner: int | None = None) -> None:
        super().__init__()
        self.config, self.size = config, size
        self.embedding = nn.Embedding(config.virtual_tokens, size if inner is None else inner)

    @property
    def has_encoder(self) -> bool:
        """Whether a network stands between the embedding and the vectors."""
        return len(self._modules) > 1

    def forward(self) -> Tensor:
        """The vectors, (tokens, size)."""
        weight: Tensor = self.embedding.weight
        return weight


class PromptEncoder(SoftPrompt):
    """P-tuning (Liu et al. 2021, arXiv 2103.10385): an MLP or LSTM over an embedding gives the vectors."""

    def __init__(self, config: PromptConfig, size: int) -> None:
        super().__init__(config, size)
        width = config.encoder_hidden_size or size
        if config.encoder == "lstm":
            self.lstm_head = nn.LSTM(
                size,
                width,
                num_layers=config.encoder_layers,
                # torch warns of dropout where there is no layer after it
                dropout=config.encoder_dropout if config.encoder_layers > 1 else 0.0,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, size))
        else:
            inner = (nn.Linear(width, width), nn.ReLU())
            self.mlp_head = nn.Sequential(nn.Linear(size, width), nn.ReLU(), *inner, nn.Linear(width, size))

    def forward(self) -> Tensor:
        """The vectors, (tokens, size)."""
        inputs = self.embedding.weight
        if self.config.encoder == "lstm":
            inputs = self.lstm_head(inputs[None])[0][0]
        vectors: Tensor = self.mlp_head(inputs)
        return vectors


class PrefixEncoder(SoftPrompt):
    """Prefix tuning (Li & Liang 2021, arXiv 2101.00190) with projection: an MLP over an embedding (tokens, inner)."""

    def __init__(self, config: PromptConfig, size: int, inner: int) -> None:
        super().__init__(config, size, inner)
        width = config.encoder_hidden_size or inner
        self.transform = nn.Sequential(nn.Linear(inner, width), nn.Tanh(), nn.Linear(width, size))

    def forward(self) -> Tensor:
        """The vectors, (tokens, size)."""
        vectors: Tensor = self.transform(self.embedding.weight)
        return vectors


def find_soft_prompt(model: nn.Module) -> SoftPrompt | None:
    """The soft prompt on the model."""
    return next((module for module in model.modules() if isinstance(module, SoftPrompt)), None)
