"""Patch-level discrimination: which class each patch of an image is, against a mask (LexVLA, 4.4).

A patch is given the class whose vector is nearest its own. Its answer counts for all of its pixels,
so a perfect model reaches what a grid of patches can, not one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import one_hot


def named_patches(
    patches: Float[Tensor, "images patches dim"], classes: Float[Tensor, "classes dim"]
) -> Int64[Tensor, "images patches"]:
    """The class of the largest product; of equal ones the first."""
    return (patches @ classes.T).argmax(dim=2)


def majority_labels(
    masks: Int64[Tensor, "images height width"], *, side: int, num_classes: int
) -> Int64[Tensor, "images patches"]:
    """What a perfect model says of a grid of `side` x `side` patches: each one's most frequent
    label; the lowest of equally frequent ones. Negative labels are no class; where a patch has
    nothing else it is class 0. Height and width are multiples of `side`."""
    images, height, width = masks.shape
    cells = masks.view(images, side, height // side, side, width // side)
    pixels = cells.permute(0, 1, 3, 2, 4).reshape(images, side * side, -1)
    counts = one_hot(pixels.clamp_min(0), num_classes) * (pixels >= 0)[..., None]
    return counts.sum(dim=2).argmax(dim=2)


def painted(
    labels: Int64[Tensor, "images patches"], *, height: int, width: int
) -> Int64[Tensor, "images height width"]:
    """Each patch's label at all of its pixels; the grid is square."""
    side = round(labels.shape[1] ** 0.5)
    grid = labels.view(-1, side, side)
    return grid.repeat_interleave(height // side, 1).repeat_interleave(width // side, 2)


def mean_iou(
    predicted: Int64[Tensor, "images height width"],
    masks: Int64[Tensor, "images height width"],
    *,
    num_classes: int,
) -> float:
    """Mean over the classes that the masks have of intersection over union, over all images.

    Pixels of a negative label count nowhere."""
    known = masks >= 0
    found, wanted = predicted[known], masks[known]
    both = torch.bincount(wanted[found == wanted], minlength=num_classes)
    either = (
        torch.bincount(found, minlength=num_classes)
        + torch.bincount(wanted, minlength=num_classes)
        - both
    )
    present = torch.bincount(wanted, minlength=num_classes) > 0
    return float((both[present] / either[present]).mean())
