"""Scores to patches: the published code's arrays, and the rules that hold for any scores."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from trainer.models.token_selection import (
    best_groups,
    drawn_groups,
    group_scores,
    num_kept,
    patches_of,
    projected_scores,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "aclip"
CODE = "floor_plus_one"


@cache
def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}


def chosen(scores: Tensor, keep: float) -> Tensor:
    groups = best_groups(group_scores(scores, 2), num_kept(49, keep, CODE))
    return patches_of(groups, side=14, group=2)


def test_the_published_selection() -> None:
    arrays = golden("attention_selection")
    rows = arrays["cls_attention_rows"]
    scores = rows.mean((0, 2))[:, 1:]
    torch.testing.assert_close(scores, arrays["score"], rtol=1e-12, atol=0)
    torch.testing.assert_close(group_scores(scores, 2), arrays["pooled_score_7x7"])
    assert torch.equal(best_groups(group_scores(scores, 2), 25), arrays["kept_groups_ranked"])
    for keep, name in ((0.25, "kept_ratio25"), (0.5, "kept_tokens"), (0.75, "kept_ratio75")):
        assert torch.equal(chosen(scores, keep), arrays[name])
        assert torch.equal(chosen(scores.float(), keep), arrays[name])
    dropped = torch.ones(scores.shape).scatter(1, chosen(scores, 0.5), 0)
    assert torch.equal(dropped.byte(), arrays["mask_true_is_dropped"])


def test_numbers_of_tokens_under_both_roundings() -> None:
    shares = (0.25, 0.5, 0.75, 0.98, 1.0)
    assert [4 * num_kept(49, keep, CODE) for keep in shares] == [52, 100, 148, 196, 196]
    assert [4 * num_kept(49, keep, "floor") for keep in shares] == [48, 96, 144, 192, 196]
    assert num_kept(49, 0.01, "floor") == 1
    assert num_kept(10, 0.7, "floor") == 7, "0.7 x 10 is 6.999... in binary"


def in_cover(boxes: Tensor) -> Tensor:
    """Top, left, height, width of the views as left, top, right, bottom in the cover."""
    top, left, height, width = boxes.double().unbind(2)
    cover = [side[:, 2:] for side in (top, left, height, width)]
    x, y = (left - cover[1]) / cover[3], (top - cover[0]) / cover[2]
    return torch.stack([x, y, x + width / cover[3], y + height / cover[2]], dim=2)[:, :2]


def by_pixels(scores: Tensor, boxes: Tensor, view: int) -> Tensor:
    """The published loop: enlarge to the cover's pixels, cut the view out, shrink."""
    found = []
    for row, sample in zip(scores, boxes.tolist(), strict=True):
        (top, left, height, width), (above, before, h, w) = sample[view], sample[2]
        large = interpolate(row.view(1, 1, 14, 14), (h, w), mode="bilinear")
        cut = large.new_zeros(1, 1, height, width)
        dy, dx = top - above, left - before
        y0, x0, y1, x1 = max(dy, 0), max(dx, 0), min(dy + height, h), min(dx + width, w)
        cut[..., y0 - dy : y1 - dy, x0 - dx : x1 - dx] = large[..., y0:y1, x0:x1]
        found.append(interpolate(cut, (14, 14), mode="bilinear").flatten())
    return torch.stack(found)


def test_the_published_projection_of_boxes() -> None:
    arrays = golden("box_projection")
    boxes = arrays["boxes_top_left_h_w"]
    ours = projected_scores(arrays["score"], in_cover(boxes), side=14)
    for view in (0, 1):
        theirs = arrays[f"score_view{view + 1}"]
        torch.testing.assert_close(by_pixels(arrays["score"], boxes, view), theirs)
        # Theirs reads the enlarged map at whole pixels of small boxes.
        torch.testing.assert_close(ours[:, view], theirs, rtol=0, atol=0.04 * float(theirs.max()))
        assert torch.equal(chosen(ours[:, view], 0.5), arrays[f"kept_view{view + 1}"])


@pytest.mark.parametrize("seed", range(3))
def test_the_loop_over_pixels_comes_to_the_same_as_pixels_get_many(seed: int) -> None:
    """Boxes a hundred times as fine leave a hundredth of the difference."""
    boxes = golden("box_projection")["boxes_top_left_h_w"][:2]
    scores = torch.rand(2, 196, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gaps = [
        float(
            (projected_scores(scores, in_cover(fine), side=14)[:, 1] - by_pixels(scores, fine, 1))
            .abs()
            .max()
        )
        for fine in (boxes, boxes * 10)
    ]
    assert gaps[1] < 0.02
    assert gaps[1] < gaps[0] / 5


def test_places_of_views_in_the_cover() -> None:
    scores = torch.rand(2, 196, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, mirrored = [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    outside = [0.5, -1.0, 1.5, 0.0]
    boxes = torch.tensor([[whole, mirrored, outside]] * 2, dtype=torch.float64)
    same, flipped, nothing = projected_scores(scores, boxes, side=14).unbind(1)
    torch.testing.assert_close(same, scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(flipped.view(2, 14, 14), scores.view(2, 14, 14).flip(2))
    assert not nothing.any()
    corner = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]], dtype=torch.float64)
    quarter = torch.zeros(1, 14, 14, dtype=torch.float64)
    quarter[:, :7, :7] = 1.0
    found = projected_scores(quarter.view(1, -1), corner, side=14).view(14, 14)
    assert bool((found[:13, :13] == 1).all()), "the quarter fills the view"


def test_a_coarse_look_is_read_at_the_centres_of_groups() -> None:
    """Of 7 x 7 scores, the identity is the scores; of any map, pooling halves by pairs."""
    scores = torch.rand(3, 49, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]] * 3, dtype=torch.float64)
    torch.testing.assert_close(projected_scores(scores, whole, side=7)[:, 0], scores)
    fine = torch.rand(2, 1, 14, 14, dtype=torch.float64)
    halved = interpolate(fine, (7, 7), mode="bilinear")
    torch.testing.assert_close(avg_pool2d(fine, 2), halved)
    torch.testing.assert_close(group_scores(fine.view(2, -1), 2), halved.view(2, -1))


def test_the_inverse_keeps_what_attention_leaves() -> None:
    scores = torch.rand(5, 49, generator=torch.Generator().manual_seed(4))
    for keep in (0.25, 0.5):
        count = num_kept(49, keep, "floor")
        best, worst = best_groups(scores, count), best_groups(scores, count, lowest=True)
        for high, low in zip(best.tolist(), worst.tolist(), strict=True):
            assert not set(high) & set(low)
    more = num_kept(49, 0.5, CODE)
    both = zip(
        best_groups(scores, more).tolist(),
        best_groups(scores, more, lowest=True).tolist(),
        strict=True,
    )
    assert {len(set(high) & set(low)) for high, low in both} == {1}
    assert torch.equal(best_groups(torch.ones(1, 9), 3), torch.tensor([[0, 1, 2]])), "the first"


def test_patches_of_groups_ascend_and_make_squares() -> None:
    assert patches_of(torch.tensor([3, 0]), side=4, group=2).tolist() == [
        0,
        1,
        4,
        5,
        10,
        11,
        14,
        15,
    ]
    assert patches_of(torch.tensor([[7, 2]]), side=4, group=1).tolist() == [[2, 7]]


def test_draws_are_those_of_the_visit_alone_and_reach_everything() -> None:
    ids = torch.arange(400) * 7919
    epochs = torch.zeros(400, dtype=torch.int64)
    options = {"views": 2, "groups": 16, "count": 4, "seed": 3}
    whole = drawn_groups(ids, epochs, **options)
    assert whole.shape == (400, 2, 4)
    assert torch.equal(drawn_groups(ids[7:9], epochs[7:9], **options), whole[7:9])
    for other in (
        drawn_groups(ids, epochs + 1, **options),
        drawn_groups(ids, epochs, **options | {"seed": 4}),
        whole.flip(1),
    ):
        assert float((other == whole).float().mean()) < 0.1
    assert all(len(set(row)) == 4 for row in whole.flatten(0, 1).tolist()), "none twice"
    counts = torch.bincount(whole.flatten(), minlength=16)
    assert float(counts.float().std() / counts.float().mean()) < 0.2
