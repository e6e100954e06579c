"""Distillation of who looks like whom: a frozen pair of towers says it, a trained one learns it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.comm import Comm


class SoftDistillation(NamedTuple):
    """Means over this rank's rows, in nats."""

    image_to_text: Float[Tensor, ""]
    """Cross-entropy of an image's similarities with all texts against the teacher's."""
    text_to_image: Float[Tensor, ""]
    teacher_entropy: Float[Tensor, ""]
    """Of what the teacher says, both ways halved: the loss of a student that says the same."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Half the sum of both ways."""
        return (self.image_to_text + self.text_to_image) / 2

    @property
    def divergence(self) -> Float[Tensor, ""]:
        """The loss above its least value: zero where student and teacher agree."""
        return self.loss - self.teacher_entropy


def soft_distillation(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "batch wide"],
    teacher_text: Float[Tensor, "batch wide"],
    teacher_scale: Float[Tensor, ""] | float,
    comm: Comm,
) -> SoftDistillation:
    """Cross-entropy of the student's similarities against the teacher's, both ways, in nats.

    For one rank `image_to_text` is `cross_entropy(s * image @ text.T, (t * U @ V.T).softmax(1))`,
    with U, V and t the teacher's rows and scale, and `text_to_image` the same with images and texts
    exchanged. Rows are unit vectors, equally many on every rank; a value is the mean over this
    rank's rows, each against the columns of all ranks. The student's rows carry gradient as queries
    and as everybody's keys; the teacher is constant. A teacher that is sure of every pair makes the
    loss `info_nce`.

    The distillation loss of open_clip; TinyCLIP's affinity mimicking (arXiv 2309.12314, equation
    2), whose code halves the sum as `loss` does where its text does not.
    """
    image_to_text = logit_scale * image @ comm.all_gather(text).T
    text_to_image = logit_scale * text @ comm.all_gather(image).T
    with torch.no_grad():
        images, texts = (comm.all_gather(rows.detach()) for rows in (teacher_image, teacher_text))
        of_images = (teacher_scale * teacher_image @ texts.T).softmax(dim=1)
        of_texts = (teacher_scale * teacher_text @ images.T).softmax(dim=1)
        entropy = (_entropy(of_images) + _entropy(of_texts)) / 2
    return SoftDistillation(
        cross_entropy(image_to_text, of_images), cross_entropy(text_to_image, of_texts), entropy
    )


def _entropy(rows: Float[Tensor, "batch columns"]) -> Float[Tensor, ""]:
    """The mean over rows that are probabilities."""
    each: Tensor = torch.special.entr(rows)
    return each.sum(dim=1).mean()
