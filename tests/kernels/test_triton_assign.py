"""Labels by the Triton kernels equal those of float64, on a CPU by the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.cluster.test_kmeans import mixture
from tests.kernels.interpreter import rows_of
from trainer.cluster.kmeans import KMeansConfig, kmeans
from trainer.cluster.search.assign import assign, prepare
from trainer.cluster.search.top import nearest
from trainer.comm import Comm

pytest.importorskip("triton", reason="Triton's wheel is for Linux")


def test_the_interpreted_kernels_give_the_exact_labels() -> None:
    """Ties, copies, overflow, ragged sizes, splits of the columns, all three precisions."""
    rows = rows_of("tests.kernels.interpreted_assign")
    cases = [row for row in rows if "case" in row]
    assert len(cases) == 31
    for row in cases:
        assert row["wrong"]["labels"] == row["wrong"]["lists"] == 0, row
    # Above a hundred rows the scan must choose: an infinite margin would pass unnoticed.
    large = [row for row in cases if row["case"]["points"] == 133]
    half = [row for row in large if row["case"]["kind"] in ("normal", "offset", "bisectors")]
    assert len(half) == 5
    assert all(row["wrong"]["candidates"] < 15 for row in half), half
    measured = [row for row in rows if "error" in row]
    assert len(measured) == 6
    assert all(row["error"] < 1e-6 for row in measured), measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 768])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_labels_of_a_cpu(dim: int, precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    centroids = torch.randn(3001, dim, generator=generator)
    pairs = torch.randint(3001, (2, 500), generator=generator)
    points = torch.cat(
        [mixture(5000, dim, components=900, spread=0.3, seed=1), centroids[pairs].mean(0)]
    )
    expected = assign(points, centroids)
    labels = assign(points.cuda(), centroids.cuda(), precision=precision)
    assert torch.equal(labels.cpu(), expected)
    found = nearest(points.cuda(), prepare(centroids.cuda(), precision=precision), count=5)
    wanted = nearest(points, prepare(centroids), count=5)
    assert torch.equal(found.ids.cpu(), wanted.ids)
    assert torch.equal(found.distances.cpu(), wanted.distances)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_clusters_to_the_same_bits() -> None:
    points, ids = mixture(20_000, 96, components=300, spread=0.3, seed=2), torch.arange(20_000)
    config = KMeansConfig(clusters=500, iterations=5, spherical=True)
    expected = kmeans(points, ids, config, Comm.solo())
    found = kmeans(points.cuda(), ids.cuda(), config, Comm.solo("cuda"))
    assert torch.equal(found.labels.cpu(), expected.labels)
    assert torch.equal(found.centroids.cpu(), expected.centroids)
