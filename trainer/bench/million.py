"""A million clusters for real: points made to disk, clustered out of core, labels compared.

The points are a mixture whose component is a hash of the sample id, so the truth needs no file.
Everything runs in a process of its own with a cap on its memory; a run that was killed goes on.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.cluster.kmeans import KMeansConfig
from trainer.cluster.quality import adjusted_rand_index, normalized_mutual_information
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels
from trainer.hashing import hash_bits, key_of
from trainer.programs.cluster import ClusterJob, cluster_store, read_figures
from trainer.store import EmbeddingStore, Identity, StoreWriter

_SHARD_ROWS = 1 << 17
_NOISE = 0.5
_LABELLED = 200_000


class Million(NamedTuple):
    """Sizes. The defaults are the real thing; smaller ones test the way."""

    points: int = 4_000_000
    dim: int = 64
    clusters: int = 1_000_000
    components: int = 500_000
    """Of the mixture that the points are drawn from."""
    iterations: int = 3
    cells: int | None = None
    """2 sqrt(K) where None."""
    probes: int = 16
    start: Literal["sampled", "hierarchical"] = "sampled"
    memory_gib: int = 24
    threads: int = 2


def run(folder: Path, case: Million) -> list[dict[str, Any]]:
    """Make the points (if they are not there), cluster them in a process of its own, compare.

    seconds_per_iteration: by the clock; peak_bytes: the most memory the process held, files that
    are mapped included; purity: share of a labelled sample whose component is the most frequent
    of its cluster there; nmi, ari: of clusters and components.
    """
    make_store(folder / "store", case)
    arguments = json.dumps([str(folder), list(case)])
    finished = subprocess.run(
        [sys.executable, "-m", "trainer.bench.million", arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the clustering process ended with {finished.returncode}")
    row: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return [row]


def make_store(folder: Path, case: Million) -> EmbeddingStore:
    """Unit vectors near their component's centre, in float16; shards that are there stay."""
    count = -(-case.points // _SHARD_ROWS)
    names = [f"mixture-{number:06d}" for number in range(count)]
    identity = Identity(
        teacher="mixture",
        model=f"{case.components} components, noise {_NOISE}",
        tokenizer="none",
        reads="nothing",
        pooling="none",
        dim=case.dim,
    )
    sizes = [min(_SHARD_ROWS, case.points - number * _SHARD_ROWS) for number in range(count)]
    sources = {name: (f"{size}", size) for name, size in zip(names, sizes, strict=True)}
    writer = StoreWriter.begin(folder, identity, sources)
    writer.announce()
    centres = _normal((case.components, case.dim), seed=0)
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if not writer.has(name):
            ids = torch.arange(size) + number * _SHARD_ROWS
            noise = _normal((size, case.dim), seed=number + 1) * _NOISE
            rows = torch.nn.functional.normalize(centres[component_of(ids, case)] + noise)
            writer.write(name, np.asarray(ids), rows[:, None])
    if not writer.finished:
        writer.finish()
    return EmbeddingStore.open(folder)


def component_of(ids: Tensor, case: Million) -> Tensor:
    """The truth."""
    return (hash_bits(ids, key_of("mixture")) >> 8) % case.components


def measure(folder: Path, case: Million) -> dict[str, Any]:
    """Cluster in this process, under the memory cap, and describe it."""
    limit = case.memory_gib << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(case.threads)
    config = KMeansConfig(
        clusters=case.clusters,
        iterations=case.iterations,
        assignment="two_level",
        cells=case.cells or 2 * math.isqrt(case.clusters),
        probes=case.probes,
        start=case.start,
        precision="float32",
        tolerance=0.0,
    )
    passes: list[tuple[float, float]] = []

    def say(line: str) -> None:
        if line.startswith("iteration "):
            passes.append((time.monotonic(), time.process_time()))
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    began, cpu = time.monotonic(), time.process_time()
    out = folder / f"clusters-{case.clusters}-{case.start}"
    cluster_store(folder / "store", out, ClusterJob(kmeans=config), Comm.solo(), say=say)
    spent = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(passes)]
    return {
        "bench": "million",
        **case._asdict(),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds_per_iteration": round(sum(s for s, _ in spent) / len(spent), 1) if spent else None,
        "cpu_seconds_per_iteration": round(sum(c for _, c in spent) / len(spent), 1)
        if spent
        else None,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "store_bytes": case.points * (2 * case.dim + 8),
        **{name: value for name, value in read_figures(out).items() if name in _SHOWN},
        **agreement(ClusterLabels.open(out), case),
    }


_SHOWN = ("objective", "search_recall", "search_inertia_above_exact", "empty", "repaired")


def agreement(labels: ClusterLabels, case: Million) -> dict[str, float]:
    """Clusters beside components, on the samples of some components (all of theirs)."""
    ids = torch.arange(case.points)
    truth = component_of(ids, case)
    shown = truth < max(case.components * _LABELLED // case.points, 1)
    found, truth = labels.of(ids[shown]), truth[shown]
    pairs, counts = torch.unique(torch.stack([found, truth], 1), dim=0, return_counts=True)
    clusters, place = torch.unique(pairs[:, 0], return_inverse=True)
    most = torch.zeros_like(clusters).scatter_reduce_(0, place, counts, "amax")
    solo = Comm.solo()
    return {
        "labelled": len(truth),
        "purity": float(most.sum() / len(truth)),
        "nmi": normalized_mutual_information(found, truth, solo),
        "ari": adjusted_rand_index(found, truth, solo),
    }


def _normal(shape: tuple[int, int], *, seed: int) -> Tensor:
    """Normal numbers, divided by the square root of the dimension."""
    generator = torch.Generator().manual_seed(seed)
    rows: Tensor = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return rows


if __name__ == "__main__":
    place, sizes = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(measure(Path(place), Million(*sizes))) + "\n")
