"""Nearest centroids by the Triton kernels, in Triton's interpreter, against all float64 distances.

As `interpreted`, a program: `TRITON_INTERPRET=1 python -m tests.kernels.interpreted_assign` prints
one JSON row a case.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cluster.test_kmeans import distances
from tests.cluster.test_top import naive
from tests.kernels.interpreted import widen_bfloat16
from trainer.cluster.search.assign import assign, prepare, scan
from trainer.cluster.search.top import nearest
from trainer.kernels import triton_assign


class Case(NamedTuple):
    points: int
    clusters: int
    dim: int
    kind: str
    precision: str = "float16"


SHAPES = ((1, 1, 1), (3, 33, 7), (133, 150, 40), (20, 70, 300))
KINDS = ("normal", "integers", "copies", "bisectors", "offset", "tiny")
CASES = [
    *(Case(*shape, kind="normal", precision="bfloat16") for shape in SHAPES),
    *(Case(*shape, kind="normal", precision="float32") for shape in SHAPES),
    *(Case(*shape, kind=kind) for kind, shape in product(KINDS, SHAPES[1:])),
    *(Case(9, 40, 12, "huge", precision=p) for p in ("float32", "bfloat16", "float16")),
    *(Case(9, 40, 12, "bisectors", precision=p) for p in ("float32", "bfloat16")),
]


def problem(case: Case) -> tuple[Tensor, Tensor]:
    """`huge` overflows in float16 and in the sums of float32; `bisectors`: any rounding shows."""
    draw = torch.Generator().manual_seed(case.points + case.dim)
    points = torch.randn(case.points, case.dim, generator=draw)
    centroids = torch.randn(case.clusters, case.dim, generator=draw)
    pairs = torch.randint(case.clusters, (2, case.points), generator=draw)
    if case.kind == "integers":
        points, centroids = points.round(), centroids.round()
    if case.kind == "bisectors":
        points = (centroids[pairs[0]] + centroids[pairs[1]]) / 2
    if case.kind == "offset":
        points, centroids = 1000 + 1e-3 * points, 1000 + 1e-3 * centroids
    if case.kind in ("tiny", "huge"):
        factor = 1e-25 if case.kind == "tiny" else 1e25
        points, centroids = points * factor, centroids * factor
    if case.kind == "copies":
        rows = torch.randint(case.clusters, (case.clusters,), generator=draw) // 2
        centroids = centroids[rows]
        points = centroids[pairs[0]]
    return points, centroids


def wrong(case: Case) -> dict[str, float]:
    """Labels and lists that differ; candidates a point."""
    points, centroids = problem(case)
    precision = getattr(torch, case.precision)
    expected = torch.from_numpy(distances(points, centroids).numpy().argmin(1))
    rows = 50 if case.kind == "bisectors" else 2048
    labels = assign(points, centroids, precision=precision, fused=True, row_block=rows)
    table = prepare(centroids, precision=precision, fused=True)
    lists = nearest(points, table, count=3).ids
    return {
        "labels": int((labels != expected).sum()),
        "lists": int((lists != naive(points, centroids, 3)).sum()),
        "candidates": len(scan(points, table, column_block=1).rows) / case.points,
    }


def maxima_error(dtype: torch.dtype, width: int) -> float:
    """Of the maxima of groups and the scores of some, against float64, relative to |x| |c|."""
    draw = torch.Generator().manual_seed(width)
    points = torch.randn(130, width, generator=draw).to(dtype)
    centroids = torch.randn(160, width, generator=draw).to(dtype)
    offsets = torch.randn(160, generator=draw)
    exact = points.double() @ centroids.double().T + offsets.double()
    tops = exact.unflatten(1, (5, 32))
    size = points.double().norm(dim=1).max() * centroids.double().norm(dim=1).max()
    rows, groups = torch.tensor([0, 129, 7]), torch.tensor([4, 0, 4])
    found = triton_assign.group_maxima(points, centroids, offsets)
    again = triton_assign.group_scores(points, centroids, offsets, rows, groups)
    first = (found.double() - tops.amax(2)).abs().max() / size
    second = (again.double() - tops[rows, groups]).abs().max() / size
    return float(torch.maximum(first, second))


def main() -> None:
    widen_bfloat16()
    triton_assign.PROGRAMS = 2
    for case in CASES:
        print(json.dumps({"case": case._asdict(), "wrong": wrong(case)}), flush=True)
    for dtype, width in product((torch.float32, torch.float16, torch.bfloat16), (16, 520)):
        row = {"dtype": str(dtype), "width": width, "error": maxima_error(dtype, width)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
