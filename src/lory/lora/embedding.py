"""An embedding with a low-rank adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lory.lora.functional import delta_weight
from lory.lora.layer import LoRALayer, check_settings


class Embedding(LoRALayer, nn.Embedding):
    """An embedding whose row i is ``W[i] + (lora_alpha / r) * B A[:, i]``.

    W is frozen; `lora_A` (r, num_embeddings), which starts at zero, and `lora_B` (embedding_dim, r), which starts
    normal, are learnt. Where it differs from nn.Embedding when r > 0: `max_norm` limits the rows that come out, with
    the adapter's part in them, and rewrites nothing; with ``sparse=True`` the gradient of A is dense all the same.
    """

    output_axis = 1

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **embedding_arguments: Any,
    ) -> None:
        """Arguments as in loralib.

        Args:
            merge_weights: eval mode uses W + delta as one weight (see `LoRALayer`).
            embedding_arguments: nn.Embedding's: padding_idx, max_norm, device, dtype and so on.

        Raises:
            ValueError: r or lora_alpha is out of range.
        """
        check_settings(r, lora_alpha, 0.0)
        super().__init__(num_embeddings, embedding_dim, **embedding_arguments)
        self._configure(r, lora_alpha, 0.0, merge_weights)
        if r > 0:
            self._add_adapter((r, num_embeddings), (embedding_dim, r), self.weight.dtype)
        if embedding_arguments.get("_weight") is None:
            # loralib draws the base weight a second time here; so do we, for the same values from the same seed
            self.reset_parameters()
        elif r > 0:  # from_pretrained and its kin give the weight
            self.reset_adapter()

    @classmethod
    def from_base(
        cls,
        base: nn.Embedding,
        r: int,
        lora_alpha: float,
        dtype: torch.dtype | None = None,
        rslora: bool = False,
    ) -> Embedding:
        """A layer that shares `base`'s weight (the same Parameter, under the same name) and never merges.

        Args:
            base: an nn.Embedding, or one that multiplies its rows by its attribute `embed_scale`, as transformers' do.
            dtype: of the adapter; by default fp32, or the weight's own when that is wider.
        """
        layer: Embedding = cls._adopt(base)
        layer._configure(r, lora_alpha, 0.0, merge_weights=False, rslora=rslora)
        if r > 0:
            dtype = dtype or torch.promote_types(base.weight.dtype, torch.float32)
            layer._add_adapter((r, base.num_embeddings), (base.embedding_dim, r), dtype)
            layer.reset_adapter()
        return layer

    def reset_parameters(self) -> None:
        """Draw the base weight anew, and the adapter with it where there is one."""
        super().reset_parameters()
        if self.has_adapter:
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Set A to zero and draw B from the standard normal distribution."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(...) indices to (..., embedding_dim), in the base weight's dtype."""
        if not self.has_adapter:
            return super().forward(x)
        if (held := self._held_weight()) is not None:
            return self._finish(self._look_up(x, held))
        rows = self._look_up(x, self.weight, self.sparse)
        change = F.linear(self._look_up(x, self.lora_A.t()) * self.scaling, self.lora_B)
        if self.has_magnitude:
            return self._finish(((rows + change) * self.magnitude_scale()).to(rows.dtype))
        return self._finish(rows + change.to(rows.dtype))

    def _look_up(self, indices: Tensor, weight: Tensor, sparse: bool = False) -> Tensor:
        return F.embedding(indices, weight, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, sparse)

    def _finish(self, rows: Tensor) -> Tensor:
        """What happens to the rows after they were looked up: transformers' scale, torch's limit."""
        if (scale := getattr(self, "embed_scale", None)) is not None:
            rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        if self.max_norm is None:
            return rows
        norms = torch.linalg.vector_norm(rows, self.norm_type, dim=-1, keepdim=True)
        # 1e-7 as in torch's own renorm
        return rows * torch.where(norms > self.max_norm, self.max_norm / (norms + 1e-7), 1.0).to(rows.dtype)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight, (num_embeddings, embedding_dim) in fp32 or higher."""
        return delta_weight(self.lora_B.t(), self.lora_A.t(), self.scaling)
