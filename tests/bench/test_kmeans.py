"""The k-means benchmark compares like with like."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch

from trainer.bench.kmeans import add_options, cases_of, measure_options, measured
from trainer.bench.kmeans_plot import plot
from trainer.bench.kmeans_worker import Size, make_points

SMALL = "--points 3000 --clusters 64 --dim 16 --iterations 2 --rounds 1"


def options_of(text: str) -> Namespace:
    parser = ArgumentParser()
    add_options(parser)
    return parser.parse_args(text.split())


def test_all_sides_do_the_same_work() -> None:
    options = options_of(SMALL)
    rows = measure_options(options)
    assert [row["name"] for row in rows] == list(options.sides)
    by_name = {row["name"]: row for row in rows}
    assert {"ours-exact", "ours-two-level", "faiss", "sklearn"} <= set(by_name)
    for row in rows:
        assert (row["points"], row["clusters"], row["dim"]) == (3000, 64, 16)
        assert row["judged"] == 3000
        assert row["threads"] == row["ranks"] == 1
        assert row["cpu_seconds"] > 0
        assert row["extra_bytes"] is None or row["extra_bytes"] >= 0
    for peer in ("ours-exact", "sklearn"):
        assert by_name[peer]["inertia"] == pytest.approx(by_name["faiss"]["inertia"], rel=1e-4)
    assert by_name["faiss"]["ratio_to_faiss"] == 1.0
    assert abs(by_name["ours-two-level"]["inertia_above_faiss"]) < 0.05


def test_two_ranks_find_what_one_finds() -> None:
    rows = measured(cases_of(options_of(f"{SMALL} --study ranks --sides ours-exact")), rounds=1)
    alone, both = rows
    assert (alone["ranks"], both["ranks"]) == (1, 2)
    assert both["inertia"] == alone["inertia"]
    assert both["rank_cpu_seconds"] < both["cpu_seconds"]
    assert both["speed_to_one_rank"] > 0
    assert "speed_to_one_rank" not in alone


def test_studies() -> None:
    curve = [case for case, _ in cases_of(options_of("--study curve --probes 2,6"))]
    assert [case.probes for case in curve] == [None, None, 2, 6]
    assert {case.size for case in curve} == {Size(262_144, 65_536, 64)}
    growth = [case.size for case, _ in cases_of(options_of("--study growth --sides faiss"))]
    assert [size.clusters for size in growth] == [1024, 2048, 4096, 8192, 1024, 1024, 1024]
    assert [size.points for size in growth[3:]] == [50_000, 100_000, 200_000, 400_000]


@pytest.mark.heavy
def test_plots(tmp_path: Path) -> None:
    sizes = [Size(100, 4, 8), Size(100, 8, 8), Size(200, 4, 8)]
    rows = [
        {**size._asdict(), "name": name, "probes": None, "cpu_seconds": 1.0, "inertia": 2.0}
        for size in sizes
        for name in ("ours-exact", "faiss")
    ]
    plot(rows, tmp_path / "growth.png")
    plot(rows[:2], tmp_path / "curve.png")
    for name in ("growth.png", "curve.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_points_are_reproducible_unit_rows() -> None:
    points = make_points(Size(500, 4, 12))
    assert torch.equal(points, make_points(Size(500, 4, 12)))
    torch.testing.assert_close(points.norm(dim=1), torch.ones(500))
