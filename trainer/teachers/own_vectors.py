"""A text tower that makes its vectors by itself, in the form that a text teacher runs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn
from torch.nn.functional import pad

from trainer.models.tower import Tower


class OwnVectors(nn.Module):
    """Token ids and their mask to what the loaded model says of each text."""

    def __init__(self, tower: Tower, *, dim: int, row: int | None, pad_token: int) -> None:
        super().__init__()
        self.tower = tower
        self.row, self.pad_token = row, pad_token
        """Tokens that every row is filled up to, and with what; as it comes where None."""
        self.config = SimpleNamespace(hidden_size=dim)

    def get_input_embeddings(self) -> nn.Module:
        """As models of transformers have it."""
        found: nn.Module = self.tower.backbone.get_input_embeddings()
        return found

    @torch.no_grad()
    def forward(
        self, tokens: Int64[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
    ) -> Float32[Tensor, "batch dim"]:
        if self.row is not None:
            missing = self.row - tokens.shape[1]
            tokens = pad(tokens, (0, missing), value=self.pad_token)
            mask = pad(mask, (0, missing), value=False)
        return self.tower.texts(tokens, mask).float()
