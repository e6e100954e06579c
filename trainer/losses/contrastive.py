"""InfoNCE between the images and the texts of the whole global batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.comm import Comm


def info_nce(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, ""],
    comm: Comm,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: each image finds its text among all ranks' texts, and the reverse.

    For one rank: the mean of `cross_entropy(s * image @ text.T, arange)` and of its transpose.
    Rows are unit vectors, equally many on every rank; row i of image and text belong together.
    The value is the mean over this rank's rows, in nats; the largest tensor is own rows x all
    columns. Both sides carry gradient, as queries and as everybody's keys.

    CLIP, arXiv 2103.00020, figure 3.
    """
    own = torch.arange(image.shape[0], device=image.device) + comm.rank * image.shape[0]
    image_to_text = logit_scale * image @ comm.all_gather(text).T
    text_to_image = logit_scale * text @ comm.all_gather(image).T
    return (cross_entropy(image_to_text, own) + cross_entropy(text_to_image, own)) / 2
