"""Contrastive losses where every image has several texts (FLAME, arXiv 2411.11927).

The texts are a frozen teacher's vectors: k times as many as the images, often wider, and without
gradient. So images travel between ranks and texts stay where they are. Each function is the mean
over this rank's rows; the mean over ranks is the loss of the global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from trainer.comm import Comm
from trainer.losses.sigmoid import columns_at_once


def multi_positive_sigmoid(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch positives dim"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    comm: Comm,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of every image-text pair of the global batch, in nats per text.

    Equals `softplus(-z * (s * image @ texts.T + bias)).sum() / num_texts`, with z = 1 where the
    text is one of the image's own and -1 elsewhere. Rows are unit vectors, equally many on every
    rank. Sends 2 * W * batch * dim numbers a rank, forward and backward together; `BLOCK_PAIRS`
    are scored at a time, and again in the backward pass. With one text an image it is SigLIP's
    loss.
    """
    total = torch.zeros_like(logit_bias)
    first = comm.rank * text.shape[0]
    for images in comm.all_gather(image).split(_images_at_once(text)):
        total = total + checkpoint(
            *(_pair_sum, images, text, logit_scale, logit_bias, first),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        first -= images.shape[0]
    return total / (text.shape[0] * text.shape[1])


def multi_positive_nce(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch positives dim"],
    logit_scale: Float[Tensor, ""],
    comm: Comm,
) -> Float[Tensor, ""]:
    """InfoNCE with k texts an image: half of each direction, in nats.

    Image to text: for each of the k slots, the image finds its text among all texts of that slot;
    the mean over slots. Text to image: each text finds its image among all images. Rows are unit
    vectors, equally many on every rank. With one text an image it is `info_nce`.

    Only images and, for each of them and each slot, one sum of exponentials travel.
    """
    batch = image.shape[0]
    parts = [
        _Partial(
            *checkpoint(
                _partial_logsumexps,
                images,
                text,
                logit_scale,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
        for images in comm.all_gather(image).split(_images_at_once(text))
    ]
    over_images = torch.logsumexp(torch.stack([part.over_images for part in parts]), dim=0)
    over_texts = _over_all_texts(torch.cat([part.over_texts for part in parts]), batch, comm)
    own = logit_scale * torch.einsum("bd,bkd->bk", image, text)
    return ((over_texts - own).mean() + (over_images - own).mean()) / 2


def _images_at_once(text: Tensor) -> int:
    return columns_at_once(text.shape[0] * text.shape[1])


class _Partial(NamedTuple):
    """What some images and this rank's texts say of each other."""

    over_images: Float[Tensor, "batch positives"]
    """Of each text, the log of the sum over these images."""
    over_texts: Float[Tensor, "batch positives"]
    """Of each image and slot, the log of the sum over the texts here."""


def _partial_logsumexps(images: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    logits = scale * torch.einsum("id,bkd->ibk", images, text)
    return logits.logsumexp(dim=0), logits.logsumexp(dim=1)


def _over_all_texts(partial: Tensor, batch: int, comm: Comm) -> Tensor:
    """log sum exp over the ranks of [W * batch, positives], then this rank's rows."""
    peak = comm.max(partial)
    mass = comm.reduce_scatter((partial - peak).exp())
    return mass.log() + peak[comm.rank * batch : (comm.rank + 1) * batch]


def _pair_sum(images: Tensor, text: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    """The sum over some images and the texts here; those of row i are of image `first` + i."""
    logits = scale * torch.einsum("id,bkd->ibk", images, text) + bias
    if -text.shape[0] < first < images.shape[0]:
        row = torch.arange(text.shape[0], device=text.device) + first
        matching = torch.arange(images.shape[0], device=text.device)[:, None] == row
        logits = torch.where(matching[:, :, None], -logits, logits)
    return -logsigmoid(-logits).sum()
