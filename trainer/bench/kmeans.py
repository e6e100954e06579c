"""k-means beside faiss and scikit-learn: same points, same first centroids, same passes.

Every side runs `iterations` updates and one last assignment, in a fresh process of its own, so
that its memory can be seen. The inertia of all is computed by the same exact pass afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.bench import million
from trainer.cluster.assign import assign
from trainer.cluster.kmeans import KMeansConfig, kmeans
from trainer.cluster.quality import mean_squared_distance
from trainer.comm import Comm
from trainer.hashing import key_of, permutation

SIDES = ("ours-exact", "ours-two-level", "ours-two-level-fast", "faiss", "sklearn")
TWO_LEVEL = {"ours-two-level": 8, "ours-two-level-fast": 4}
"""Probes of each two-level side; about 1.4 sqrt(K) cells."""


class Size(NamedTuple):
    """One data set."""

    points: int
    clusters: int
    dim: int


SIZES = (Size(200_000, 2048, 128), Size(200_000, 8192, 128), Size(100_000, 4096, 512))
QUICK = (Size(20_000, 1024, 64),)


def add_options(command: ArgumentParser) -> None:
    command.add_argument("--full", action="store_true", help="the large sizes: many minutes")
    command.add_argument("--rounds", type=int, default=2, help="runs of each side; the best counts")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--million", type=Path, metavar="FOLDER", help="out of core, made there")
    command.add_argument("--clusters", type=int, default=1_000_000, help="of --million")
    starts = ("sampled", "hierarchical")
    command.add_argument("--init", dest="start", choices=starts, default="sampled")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    if options.million is None:
        sizes = SIZES if options.full else QUICK
        return run(sizes, threads=options.threads, rounds=options.rounds)
    case = million.Million(
        points=4 * options.clusters,
        clusters=options.clusters,
        components=max(options.clusters // 2, 1),
        start=options.start,
        threads=options.threads,
    )
    return million.run(options.million, case)


def run(
    sizes: Sequence[Size] = SIZES,
    *,
    iterations: int = 5,
    threads: int = 1,
    rounds: int = 2,
    sides: Sequence[str] = SIDES,
) -> list[dict[str, Any]]:
    """One row per size and side; the sides take turns and each keeps its fastest round.

    seconds: by the clock; cpu_seconds: of all threads, what to compare on a busy machine;
    ratio_to_faiss: faiss's cpu_seconds over the side's; extra_bytes: the most memory held above
    points and first centroids (None where /proc doesn't tell).
    """
    rows = []
    for size in sizes:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for side in sides:
                row = _in_process(side, size, iterations=iterations, threads=threads)
                if side not in best or row["cpu_seconds"] < best[side]["cpu_seconds"]:
                    best[side] = row
        rows += [_compared(row, best.get("faiss")) for row in best.values()]
    return rows


def _compared(row: dict[str, Any], peer: dict[str, Any] | None) -> dict[str, Any]:
    if peer is None:
        return row
    return {
        **row,
        "ratio_to_faiss": round(peer["cpu_seconds"] / row["cpu_seconds"], 3),
        "inertia_above_faiss": round(row["inertia"] / peer["inertia"] - 1.0, 6),
    }


def make_points(size: Size) -> Tensor:
    """Unit rows near a smooth 24-dimensional surface, with noise: not a mixture of few blobs."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(size.points, 24, generator=generator) * torch.linspace(1.0, 0.2, 24)
    bend = torch.randn(24, size.dim, generator=generator)
    mix = torch.randn(size.dim, size.dim, generator=generator) / size.dim**0.5
    points = torch.empty(size.points, size.dim)
    for rows, chunk in zip(points.split(8192), latent.split(8192), strict=True):
        noise = 0.3 * torch.randn(rows.shape, generator=generator)
        torch.nn.functional.normalize(torch.tanh(chunk @ bend) @ mix + noise, out=rows)
    return points


def measure(side: str, size: Size, *, iterations: int) -> dict[str, Any]:
    """Run one side in this process and describe it."""
    points = make_points(size)
    start = points[permutation(size.points, key_of("bench"))[: size.clusters]].clone()
    side_of = _side(side, size, iterations)
    before = _resident_bytes(reset=True)
    clock, cpu = time.perf_counter(), time.process_time()
    centroids = side_of(points, start)
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    peak = _peak_bytes()
    labels = assign(points, centroids)
    inertia = mean_squared_distance(points, centroids, labels, Comm.solo()) * size.points
    return {
        "bench": "kmeans",
        "name": side,
        **size._asdict(),
        "threads": torch.get_num_threads(),
        "iterations": iterations,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "inertia": inertia,
        "extra_bytes": None if peak is None or before is None else peak - before,
    }


def _side(side: str, size: Size, iterations: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The function to time. What it imports is imported before the clock starts."""
    if side == "faiss":
        return _faiss(size, iterations)
    if side == "sklearn":
        return _sklearn(size, iterations)
    config = KMeansConfig(clusters=size.clusters, iterations=iterations)
    if side in TWO_LEVEL:
        cells = int(1.4 * size.clusters**0.5)
        two_level = {"assignment": "two_level", "cells": cells, "probes": TWO_LEVEL[side]}
        config = config.model_copy(update=two_level)
    ids = torch.arange(size.points)
    return lambda points, start: kmeans(points, ids, config, Comm.solo(), initial=start).centroids


def _faiss(size: Size, iterations: int) -> Callable[[Tensor, Tensor], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def cluster(points: Tensor, start: Tensor) -> Tensor:
        trainer = faiss.Kmeans(
            size.dim,
            size.clusters,
            niter=iterations,
            max_points_per_centroid=size.points,
            min_points_per_centroid=1,
        )
        trainer.train(points.numpy(), init_centroids=start.numpy())
        trainer.assign(points.numpy())
        assert trainer.centroids is not None
        return torch.from_numpy(trainer.centroids.copy())

    return cluster


def _sklearn(size: Size, iterations: int) -> Callable[[Tensor, Tensor], Tensor]:
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)

    def cluster(points: Tensor, start: Tensor) -> Tensor:
        peer = KMeans(
            size.clusters, init=start.numpy(), n_init=1, max_iter=iterations, tol=0.0, copy_x=False
        )
        return torch.from_numpy(peer.fit(points.numpy()).cluster_centers_)

    return cluster


# -- processes and memory ---------------------------------------------------------------------


def _in_process(side: str, size: Size, *, iterations: int, threads: int) -> dict[str, Any]:
    """`measure` in a fresh process with this many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    root = str(Path(__file__).parents[2])
    arguments = json.dumps([side, list(size), iterations])
    finished = subprocess.run(
        [sys.executable, "-m", "trainer.bench.kmeans", arguments],
        env={**os.environ, **dict.fromkeys(names, str(threads))},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"{side} on {size} failed:\n{finished.stderr}")
    row: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return row


def _resident_bytes(*, reset: bool) -> int | None:
    """Memory held now; with `reset`, the peak that Linux remembers starts anew."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak_bytes() -> int | None:
    return _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


if __name__ == "__main__":
    chosen, shape, updates = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(measure(chosen, Size(*shape), iterations=updates)) + "\n")
