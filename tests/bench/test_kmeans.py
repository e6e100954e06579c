"""The k-means benchmark compares like with like."""

from __future__ import annotations

import pytest
import torch

from trainer.bench.kmeans import SIDES, Size, make_points, run


def test_all_sides_do_the_same_work() -> None:
    rows = run([Size(3000, 64, 16)], iterations=2, rounds=1)
    assert [row["name"] for row in rows] == list(SIDES)
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        assert row["points"] == 3000
        assert row["clusters"] == 64
        assert row["threads"] == 1
        assert row["cpu_seconds"] > 0
        assert row["extra_bytes"] is None or row["extra_bytes"] >= 0
    for peer in ("ours-exact", "sklearn"):
        assert by_name[peer]["inertia"] == pytest.approx(by_name["faiss"]["inertia"], rel=1e-4)
    assert by_name["faiss"]["ratio_to_faiss"] == 1.0
    assert abs(by_name["ours-two-level"]["inertia_above_faiss"]) < 0.05


def test_points_are_reproducible_unit_rows() -> None:
    points = make_points(Size(500, 4, 12))
    assert torch.equal(points, make_points(Size(500, 4, 12)))
    torch.testing.assert_close(points.norm(dim=1), torch.ones(500))
