"""Which patches of a view an image tower reads: those that a momentum copy attends to, or a draw.

The copy looks at a crop that covers all views of an image. Its scores are carried into each view by
where that lies in the crop, pooled over groups of neighbours, and ranked; as many groups are kept
of every view. A-CLIP, arXiv 2212.08653, sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from trainer.hashing import hash_bits, key_of
from trainer.models.tower import Tower
from trainer.types import Batch, Features

Rounding = Literal["floor", "floor_plus_one"]

SCORES = "patch_scores"
KEPT = "kept"
_EDGE = 1e-5
"""By so much of a side a place may lie outside from rounding alone."""


def asks_for_scores(batch: Batch) -> bool:
    """Whether a batch is a look at the cover alone."""
    return batch.images is None and batch.cover is not None


def look_at_cover(batch: Batch) -> Batch:
    """The batch that asks a model for the scores of `batch`."""
    return Batch(None, None, None, batch.sample_id, cover=batch.cover)


def scored(tower: Tower, batch: Batch) -> tuple[Features, Float[Tensor, "batch width"]]:
    """Features with the patches' scores, and what the tower's projection reads of the cover."""
    assert batch.cover is not None
    pooled, scores = tower(batch.cover, wanted="attended")
    return Features(more={SCORES: scores}), pooled


def first_kept(batch: Batch) -> Int64[Tensor, "batch kept"] | None:
    """Patches of the first view that are read; None for all."""
    kept = (batch.more or {}).get(KEPT)
    return None if kept is None else kept[:, 0]


def all_kept(batch: Batch) -> Int64[Tensor, "rows kept"] | None:
    """Those of every view, in the order in which `encode_views` runs them; None for all."""
    kept = (batch.more or {}).get(KEPT)
    return None if kept is None else kept.flatten(0, 1)


def num_kept(count: int, keep: float, rounding: Rounding) -> int:
    """Of `count` groups, the share `keep`: the same number for every image.

    `floor_plus_one` is the published code's: 25 of 49 at one half.
    """
    share = int(count * keep + 1e-9)
    return max(1, min(count, share + (rounding == "floor_plus_one")))


def projected_scores(
    scores: Float[Tensor, "batch patches"], boxes: Float[Tensor, "batch views 4"], *, side: int
) -> Float[Tensor, "batch views cells"]:
    """The cover's scores at `side` x `side` places of each view: linear between the centres of its
    patches, constant beyond the outermost, and zero outside of the cover.

    `boxes` as in `Batch`. In the limit of many pixels it is the published loop, which enlarges the
    map to the pixels of the cover, cuts the view out and shrinks it.
    """
    own = int(scores.shape[1] ** 0.5)
    centres = (torch.arange(side, device=scores.device, dtype=scores.dtype) + 0.5) / side
    left, top, right, bottom = boxes.to(scores.dtype).flatten(0, 1).unbind(1)
    across = left[:, None] + centres * (right - left)[:, None]
    down = top[:, None] + centres * (bottom - top)[:, None]
    shape = (len(across), side, side)
    places = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], dim=3)
    maps = scores.view(-1, 1, own, own).repeat_interleave(boxes.shape[1], dim=0)
    values = grid_sample(maps, 2 * places - 1, padding_mode="border", align_corners=False)
    inside = ((places >= -_EDGE) & (places <= 1 + _EDGE)).all(dim=3)
    return (values[:, 0] * inside).view(*boxes.shape[:2], -1)


def group_scores(scores: Float[Tensor, "*rows patches"], group: int) -> Float[Tensor, "*rows g"]:
    """The mean score of each square of `group` x `group` patches."""
    side = int(scores.shape[-1] ** 0.5)
    means = avg_pool2d(scores.reshape(-1, 1, side, side), group)
    return means.view(*scores.shape[:-1], -1)


def best_groups(
    scores: Float[Tensor, "*rows groups"], count: int, *, lowest: bool = False
) -> Int64[Tensor, "*rows count"]:
    """The groups of the highest scores, best first, or of the lowest; of equal ones the first."""
    return scores.sort(dim=-1, descending=not lowest, stable=True).indices[..., :count]


def drawn_groups(
    sample_id: Int64[Tensor, " batch"],
    epoch: Int64[Tensor, " batch"],
    *,
    views: int,
    groups: int,
    count: int,
    seed: int,
) -> Int64[Tensor, "batch views count"]:
    """Groups by chance: a hash of the sample's visit, so the same on any ranks and after a
    restart."""
    visits = hash_bits(sample_id, key_of(seed, "tokens")) ^ hash_bits(epoch, key_of("epoch"))
    cells = torch.arange(views * groups, device=sample_id.device).view(views, groups)
    bits = hash_bits(visits[:, None, None] ^ hash_bits(cells, key_of("cell")))
    return bits.argsort(dim=-1, stable=True)[..., :count]


def patches_of(
    groups: Int64[Tensor, "*rows count"], *, side: int, group: int
) -> Int64[Tensor, "*rows kept"]:
    """The patches of groups, in ascending order; `side` patches are in a row of the image."""
    per_row = side // group
    top, left = groups // per_row * group, groups % per_row * group
    steps = torch.arange(group, device=groups.device)
    rows, columns = top[..., None, None] + steps[:, None], left[..., None, None] + steps
    return (rows * side + columns).flatten(-3).sort(dim=-1).values
