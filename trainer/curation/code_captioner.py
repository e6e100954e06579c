"""Captions and codes of images by a trained codebook (recipe `codebook`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.data.pixels import Pixels
from trainer.models.code_tower import CodeTower

_MAX_PIXELS = 25_000_000


class CodebookCaptioner:
    """A codebook's own captioner: it sees of an image what its codes say of it."""

    def __init__(
        self,
        model: CodeTower,
        pixels: Pixels,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        *,
        about: dict[str, object],
        longest: int,
        most_tokens: int,
        beams: int,
        rows: int,
    ) -> None:
        """`longest` is the longest caption that it was trained on; no longer one is written."""
        self.model, self.pixels, self.tokenizer = model.eval(), pixels, tokenizer
        self.most_tokens, self.beams, self.rows = min(most_tokens, longest - 1), beams, rows
        self.device, self._of_model = device, about

    @property
    def about(self) -> dict[str, object]:
        return {**self.about_codes, "most_tokens": self.most_tokens, "beams": self.beams}

    @property
    def about_codes(self) -> dict[str, object]:
        return {**self._of_model, "pixels": self.pixels.text}

    @property
    def num_codes(self) -> int:
        return self.model.image.codebook.config.count

    def read(self, data: bytes) -> Tensor:
        return self.pixels.decode(data, max_pixels=_MAX_PIXELS)

    @torch.no_grad()
    def codes(self, images: Sequence[Tensor]) -> Int64[Tensor, "images patches"]:
        found = [self.model.image.quantised(block)[0].codes for block in self._blocks(images)]
        return torch.cat(found).cpu()

    def write(self, images: Sequence[Tensor]) -> list[str]:
        begin: Any = self.tokenizer.bos_token_id
        texts: list[str] = []
        for block in self._blocks(images):
            ids = self.model.write(
                block, begin=begin, most_tokens=self.most_tokens, beams=self.beams
            )
            found = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts += [" ".join(text.split()) for text in found]
        return texts

    def _blocks(self, images: Sequence[Tensor]) -> list[Tensor]:
        starts = range(0, len(images), self.rows)
        blocks = (torch.stack(list(images[first : first + self.rows])) for first in starts)
        return [self.pixels.normalized(block.to(self.device)) for block in blocks]
