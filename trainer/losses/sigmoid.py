"""SigLIP: every image-text pair of the global batch is a yes-or-no question."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from trainer.comm import Comm

BLOCK_PAIRS = 1 << 24
"""Of which logits exist at once: 64 MiB in float32."""


def sigmoid_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    comm: Comm,
) -> Float[Tensor, ""]:
    """Binary cross-entropy over this rank's images and all ranks' texts, summed over texts.

    Equals `-logsigmoid(z * (s * image @ texts.T + bias)).sum(1).mean()`, with z = 1 for the own
    pair and -1 for all others. Rows are unit vectors, equally many on every rank. In nats per
    image. Some texts at a time, of as many ranks as there are: the pairs of a block are computed
    again in the backward pass, so no more than `BLOCK_PAIRS` of them exist.

    SigLIP, arXiv 2303.15343, algorithm 1.
    """
    total = torch.zeros_like(logit_bias)
    first = comm.rank * image.shape[0]
    for texts in comm.all_gather(text).split(columns_at_once(image.shape[0])):
        total = total + checkpoint(
            *(_block_sum, image, texts, logit_scale, logit_bias, first),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        first -= texts.shape[0]
    return total / image.shape[0]


def columns_at_once(num_rows: int) -> int:
    """So many columns of a block of pairs: launches do not grow with the number of ranks."""
    return max(1, BLOCK_PAIRS // max(1, num_rows))


def _block_sum(
    image: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, first: int
) -> Tensor:
    """The sum over one block of pairs; image i's own text is column `first` + i, if it is here."""
    logits = logit_scale * image @ texts.T + logit_bias
    if -image.shape[0] < first < texts.shape[0]:
        row = torch.arange(image.shape[0], device=image.device)
        matching = row[:, None] + first == torch.arange(texts.shape[0], device=image.device)
        logits = torch.where(matching, -logits, logits)
    return -logsigmoid(-logits).sum()
