"""What the model says of evaluation images and texts, spread over ranks.

ZeRO-3 gathers parameters inside a forward pass, so every rank calls `encode` equally often, on
batches of one size; rows that only fill up are dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.data.pixels import Pixels
from trainer.data.tokenize import tokenize
from trainer.errors import ConfigError
from trainer.evals.context import EvalContext
from trainer.evals.samples import BLOCK, FILLER, Block, Record, own_positions, read_blocks
from trainer.long_work import counted
from trainer.recipe import Encode
from trainer.types import Batch


class Share(NamedTuple):
    """This rank's contiguous share of an evaluation set, unusable samples left out."""

    features: Float[Tensor, "n dim"]
    records: list[Record]
    """One per row."""


def embed_images(
    spec: str, encode: Encode, context: EvalContext, *, limit: int | None = None
) -> Share:
    """Image features of this rank's share of the shards; shares stack up in rank order.

    The rows do not depend on the number of ranks. Encoded once per (shards, limit) where the
    context shares encoded splits.
    """
    encoded = {} if context.encoded is None else context.encoded
    if (spec, limit) not in encoded:
        encoded[spec, limit] = _embedded(spec, encode, context, limit)
    share: Share = encoded[spec, limit]
    return share


def embed_texts(
    texts: Sequence[str], encode: Encode, context: EvalContext
) -> Float[Tensor, "n dim"]:
    """Text features of all texts, the same on every rank; the ranks share the work.

    Every rank passes the same texts, at least one. A ConfigError where the model reads no text.
    """
    if context.tokenizer is None:
        raise ConfigError(
            "the model reads no text, so nothing can be compared with texts; "
            "evaluate it by knn or linear_probe"
        )
    comm = context.comm
    own = own_positions(len(texts), comm)
    rows = counted(own, "evaluating", total=own.numel(), unit="texts", size=len)
    features = torch.cat([_encode_texts(row.tolist(), texts, encode, context) for row in rows])
    return comm.gather_rows(features[(own.flatten() >= 0).to(features.device)])


def _embedded(spec: str, encode: Encode, context: EvalContext, limit: int | None) -> Share:
    features: list[Tensor] = []
    records: list[Record] = []
    for block in read_blocks(
        spec,
        size=context.image_size,
        limit=limit,
        data=context.data,
        comm=context.comm,
        pixels=context.pixels,
        stored=context.stored,
    ):
        features.append(_encode_images(block, encode, context))
        records += block.records
    return Share(torch.cat(features), records)


def _encode_images(block: Block, encode: Encode, context: EvalContext) -> Tensor:
    device = context.comm.device
    images = block.images.to(device)
    if context.stored is None:
        images = (context.pixels or Pixels(context.image_size)).normalized(images)
    batch = Batch(images, tokens=None, token_mask=None, sample_id=block.sample_id.to(device))
    features = encode(batch).image
    if features is None:
        raise ValueError("the model gives no image features")
    return features.detach().float()[block.usable.to(device)]


def _encode_texts(
    positions: list[int], texts: Sequence[str], encode: Encode, context: EvalContext
) -> Tensor:
    """Features of one block of texts; a position of -1 repeats the last text."""
    assert context.tokenizer is not None
    device = context.comm.device
    chosen = [texts[position] for position in positions]
    tokens, mask = tokenize(context.tokenizer, chosen, length=context.text_length)
    ids = torch.full((BLOCK,), FILLER, device=device)
    features = encode(Batch(None, tokens.to(device), mask.to(device), ids)).text
    if features is None:
        raise ValueError("the model gives no text features")
    return features.detach().float()
