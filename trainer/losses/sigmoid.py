"""SigLIP: every image-text pair of the global batch is a yes-or-no question."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from trainer.comm import Comm


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
    image. One rank's texts at a time: the pairs of a block are computed again in the backward
    pass, so no more than batch x batch of them exist.

    SigLIP, arXiv 2303.15343, algorithm 1.
    """
    total = torch.zeros_like(logit_bias)
    for rank, texts in enumerate(comm.all_gather(text).split(text.shape[0])):
        total = total + checkpoint(
            _block_sum,
            image,
            texts,
            logit_scale,
            logit_bias,
            rank == comm.rank,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / image.shape[0]


def _block_sum(
    image: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, own: bool
) -> Tensor:
    """The sum over one block of pairs; in the own block the diagonal is the matching pairs."""
    logits = logit_scale * image @ texts.T + logit_bias
    if own:
        matching = torch.eye(image.shape[0], dtype=torch.bool, device=image.device)
        logits = torch.where(matching, -logits, logits)
    return -logsigmoid(-logits).sum()
