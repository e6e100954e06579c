"""The crops of several views of one image, and the crop that covers them.

All draws are hashes of (seed, purpose, epoch, sample id), so they depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import AugmentConfig, Geometry, ViewsConfig
from trainer.data.decode import Box
from trainer.data.views import View, random_crop
from trainer.hashing import key_of, uniform_of


def view_purposes(
    purpose: str, views: ViewsConfig, first: AugmentConfig
) -> list[tuple[str, AugmentConfig]]:
    """What each view's randomness is keyed by, and how it is drawn. The first view is keyed by
    `purpose` itself: it looks the same whether there are others or not."""
    others = views.augment or first
    return [(purpose, first)] + [(f"{purpose}/view {n}", others) for n in range(1, views.count)]


def cover_size(image_size: int, views: ViewsConfig) -> int:
    """Pixels per side of the covering look."""
    return max(1, round(image_size * views.cover_scale))


class Crops:
    """The crops of one visit of a sample, known once the size of its image is."""

    def __init__(
        self, sample_id: int, views: Sequence[View], *, geometry: Geometry = "covering"
    ) -> None:
        self.sample_id, self.views, self.geometry = sample_id, views, geometry
        self._size = (0, 0)

    def of(self, view: View, width: int, height: int) -> Box:
        """In pixels of the image."""
        self._size = width, height
        return random_crop(width, height, sample_id=self.sample_id, view=view)

    def covering(self, width: int, height: int) -> Box:
        """A random box that holds the crops of all views: each of its edges is uniform between
        theirs and the image's (A-CLIP, arXiv 2212.08653, with the published code's bounds mended).
        """
        self._size = width, height
        boxes = [self.of(view, width, height) for view in self.views]
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        left, top, right, bottom = draws = self._cover_draws()
        if self.geometry == "as_published":
            return _as_published(boxes, draws, width, height)
        return (
            left * min(lefts),
            top * min(tops),
            min(max(rights) + right * (width - max(rights)), width),
            min(max(bottoms) + bottom * (height - max(bottoms)), height),
        )

    def _cover_draws(self) -> Box:
        seed, epoch, purpose, _ = self.views[0]
        key = key_of(seed, purpose, "cover")
        left, top, right, bottom = (uniform_of(self.sample_id, key, epoch, n) for n in range(4))
        return left, top, right, bottom

    def boxes(self) -> list[Box]:
        """Where each view lies in the covering crop, whose sides have length one."""
        left, top, right, bottom = self.covering(*self._size)
        width, height = right - left, bottom - top
        return [
            ((x - left) / width, (y - top) / height, (u - left) / width, (v - top) / height)
            for x, y, u, v in (self.of(view, *self._size) for view in self.views)
        ]


def _as_published(boxes: Sequence[Box], draws: Box, width: int, height: int) -> Box:
    """The bounds of A-CLIP's code, by which most boxes of wide images miss a part of a view: the
    left one is the second view's height, and a box that moves out doesn't grow by as much."""
    (first, *_), (_, upper, _, lower) = boxes
    least_left, least_top = min(first, lower - upper), min(top for _, top, _, _ in boxes)
    left, top = draws[0] * least_left, draws[1] * least_top
    across = max(right for _, _, right, _ in boxes) - least_left
    down = max(bottom for _, _, _, bottom in boxes) - least_top
    return (
        left,
        top,
        left + across + draws[2] * (width - left - across),
        top + down + draws[3] * (height - top - down),
    )
