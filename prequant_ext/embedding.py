"""PreQuantEmbedding: a table of 8-bit codes; a lookup dequantizes only the rows it reads."""

from typing import Any

import torch
from torch import Tensor, nn

from prequant_ext import ops, quantize
from prequant_ext.config import PreQuantConfig
from prequant_ext.frozen import FrozenWeight, empty_parameter


class PreQuantEmbedding(FrozenWeight):
    """``rows = (codes[ids] - zero_point) * scale``, 8-bit min-max codes per row or per tensor.  PreQuant, Section 5.1.

    Frozen     weight_packed (V, D) uint8 · weight_scale float32 and weight_zero_point uint8: (V, 1) or (1, 1)
    ids are integers of any shape; the rows come in the layer's dtype. ``padding_idx`` is kept for the float layer; a
    frozen table has no gradient to mask.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        granularity: str = "row",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.shape = (num_embeddings, embedding_dim)
        self.granularity = granularity
        self.squared_error: float | None = None
        blocks = (num_embeddings if granularity == "row" else 1, 1)
        self.weight_packed = empty_parameter((num_embeddings, embedding_dim), torch.uint8, device)
        self.weight_scale = empty_parameter(blocks, torch.float32, device)
        self.weight_zero_point = empty_parameter(blocks, torch.uint8, device)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, config: PreQuantConfig, *, name: str = "embedding"
    ) -> "PreQuantEmbedding":
        """The 8-bit twin of an ``nn.Embedding``. Raises ValueError naming ``name`` on NaN or Inf."""
        table = embedding.weight.detach()
        layer = cls(
            *table.shape,
            padding_idx=embedding.padding_idx,
            granularity=config.embedding_granularity,
            dtype=table.dtype,
            device="meta",
        )
        layer.load_quantized(*quantize.quantize_table(table, config, name=name))
        return layer

    def load_quantized(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        self._set("weight_packed", codes)
        self._set("weight_scale", scale)
        self._set("weight_zero_point", zero_point)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ops.embedding(
            ids.reshape(-1).long(), self.weight_packed, self.weight_scale, self.weight_zero_point, self.compute_dtype
        )
        return rows.view(*ids.shape, self.embedding_dim)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The dense (V, D) float32 table."""
        return ops.dequantize(
            self.weight_packed, self.weight_scale, self.weight_zero_point, self.embedding_dim, 8, torch.float32
        )

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """A float table holding :meth:`dequantize` in the layer's dtype."""
        table = self.dequantize().to(self.compute_dtype)
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")
        embedding.weight = nn.Parameter(table)
        return embedding

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._take_disk_name(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8, per {self.granularity}"
