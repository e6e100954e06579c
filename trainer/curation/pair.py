"""Images and captions to vectors of one space, by a pair of towers that is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from trainer.curation.perceptual import SIDE
from trainer.data.captions import field_texts
from trainer.data.decode import BadSample, Box, decode_image
from trainer.data.fields import find_image
from trainer.data.pixels import Pixels
from trainer.data.shards import RawSample
from trainer.data.tokenize import tokenize
from trainer.recipe import Encode
from trainer.store import Identity
from trainer.types import Batch

_MAX_PIXELS = 25_000_000
_WHITE = (255, 255, 255)


class Picture(NamedTuple):
    """What is read of a sample's image."""

    pixels: UInt8[Tensor, "3 size size"]
    squeezed: UInt8[Tensor, "3 32 32"]
    data: bytes
    width: int
    height: int


class Pair:
    """A model's two towers, and how samples become their input.

    Vectors have unit length. Those of a sample depend on it alone, to rounding: batches have
    `rows` rows, whatever the number of processes.
    """

    def __init__(
        self,
        encode: Encode,
        pixels: Pixels,
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str,
        model_hash: str,
        settings: str,
        length: int,
        dim: int,
        device: torch.device,
        caption: str = "txt",
        images: Sequence[str] = ("png", "jpg", "jpeg", "webp"),
        rows: int = 16,
    ) -> None:
        self._encode, self.pixels, self.tokenizer = encode, pixels, tokenizer
        self.length, self.device, self.rows = length, device, rows
        self.caption_field, self.images = caption, tuple(images)
        self.identity = Identity(
            teacher=name,
            model=model_hash,
            tokenizer=f"{pixels.text}, of {','.join(images)}; {caption} in {length} tokens",
            reads="image",
            pooling="embedding, unit norm",
            mask="none",
            dim=dim,
            settings=settings,
        )

    def picture(self, sample: RawSample) -> Picture:
        """BadSample where there is no image that can be decoded."""
        data = find_image(sample.fields, self.images)
        sizes: list[tuple[int, int]] = []

        def whole(width: int, height: int) -> Box:
            sizes.append((width, height))
            return 0.0, 0.0, float(width), float(height)

        squeezed = decode_image(
            data, size=SIDE, background=_WHITE, max_pixels=_MAX_PIXELS, crop=whole
        )
        pixels = self.pixels.decode(data, max_pixels=_MAX_PIXELS)
        return Picture(pixels, squeezed, data, *sizes[0])

    def caption(self, sample: RawSample) -> str:
        """The first text of the caption's field; BadSample where there is none."""
        texts = field_texts(sample.fields, self.caption_field)
        if not texts:
            raise BadSample(f"no caption in {self.caption_field}")
        return texts[0]

    @torch.inference_mode()
    def image_vectors(self, pictures: Sequence[Tensor]) -> Float32[Tensor, "n dim"]:
        parts = [torch.empty(0, self.identity.dim)]
        for first in range(0, len(pictures), self.rows):
            block = torch.stack(list(pictures[first : first + self.rows])).to(self.device)
            features = self._encode(_batch(self.pixels.normalized(block), None, None)).image
            parts.append(_unit(features))
        return torch.cat(parts)

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str]) -> Float32[Tensor, "n dim"]:
        parts = [torch.empty(0, self.identity.dim)]
        for first in range(0, len(texts), self.rows):
            chosen = list(texts[first : first + self.rows])
            tokens, mask = tokenize(self.tokenizer, chosen, length=self.length)
            batch = _batch(None, tokens.to(self.device), mask.to(self.device))
            parts.append(_unit(self._encode(batch).text))
        return torch.cat(parts)


def _batch(images: Tensor | None, tokens: Tensor | None, mask: Tensor | None) -> Batch:
    values = images if images is not None else tokens
    assert values is not None
    ids = torch.full((len(values),), -1, device=values.device)
    return Batch(images, tokens, mask, ids)


def _unit(features: Tensor | None) -> Float[Tensor, "n dim"]:
    assert features is not None
    return normalize(features.float(), dim=-1).cpu()
