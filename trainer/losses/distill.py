"""Distillation of who looks like whom: a frozen pair of towers says it, a trained one learns it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.comm import Comm


def soft_distillation(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "batch wide"],
    teacher_text: Float[Tensor, "batch wide"],
    teacher_scale: Float[Tensor, ""] | float,
    comm: Comm,
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's similarities against the teacher's, both ways, in nats.

    For one rank: half the sum of `cross_entropy(s * image @ text.T, (t * U @ V.T).softmax(1))`,
    with U, V and t the teacher's rows and scale, and of the same with images and texts exchanged.
    The teacher's entropy is not subtracted, so the least value is not zero. Rows are unit vectors,
    equally many on every rank; the value is the mean over this rank's rows, each against the
    columns of all ranks. The student's rows carry gradient as queries and as everybody's keys; the
    teacher is constant. A teacher that is sure of every pair makes it `info_nce`.

    The distillation loss of open_clip; the affinities of TinyCLIP, arXiv 2309.12314, equation 2.
    """
    image_to_text = logit_scale * image @ comm.all_gather(text).T
    text_to_image = logit_scale * text @ comm.all_gather(image).T
    with torch.no_grad():
        images, texts = (comm.all_gather(rows.detach()) for rows in (teacher_image, teacher_text))
        of_images = (teacher_scale * teacher_image @ texts.T).softmax(dim=1)
        of_texts = (teacher_scale * teacher_text @ images.T).softmax(dim=1)
    return (cross_entropy(image_to_text, of_images) + cross_entropy(text_to_image, of_texts)) / 2
