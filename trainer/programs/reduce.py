"""What tools/reduce.py does: cluster a scan's vectors, select, and lay out the comparison.

OUT/selection.json, *.keep.npy   what data.select takes; OUT/clusters/ the k-means it is made by
OUT/bags/                        bags of codes, where codes are clustered
OUT/random/                      the control: as many samples, drawn by hash
OUT/compare.yaml                 full set, selection and control, at the same samples seen
OUT/reduce.json, reduce.md, reduce.png   figures
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from trainer.cluster.duplicates import without_duplicates
from trainer.cluster.problem import KMeansConfig
from trainer.cluster.stored import StoredPoints
from trainer.comm import Comm, agreed
from trainer.curation.code_files import CodeFiles
from trainer.curation.policy import Policy
from trainer.curation.reduce import Clustering, Reduction, groups_of
from trainer.curation.scan import IMAGES
from trainer.data.index import index_path, write_index
from trainer.data.selection import HEADER, read_shares
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import ConfigError
from trainer.long_work import counted
from trainer.programs.cluster import CENTROIDS, ClusterJob, cluster_store
from trainer.store import EmbeddingStore
from trainer.store.header import write_whole
from trainer.teachers.fill import embed
from trainer.tensor_files import read_tensors

CLUSTERS, RANDOM, BAGS, DISTINCT = "clusters", "random", "bags", "distinct.npy"
Say = Callable[[str], None]


def reduce_scan(
    spec: str,
    scan: Path,
    out: Path,
    policy: Policy,
    comm: Comm,
    *,
    labels: Path | None = None,
    codes: Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Write the selection, its control and its figures.

    Clusters are those of `labels`, or are made of the bags of `codes`, or of the scan's vectors.
    """
    shards = ShardSet.open(spec)
    if codes is not None and (labels is not None or policy.clusters is None):
        raise ConfigError("--codes are clustered: give --clusters with them, and no --labels")
    agreed(comm, lambda: out.mkdir(parents=True, exist_ok=True))
    vectors = scan / IMAGES
    if codes is not None:
        vectors = out / BAGS
        bags = agreed(comm, lambda: CodeFiles(codes, shards))
        embed(spec, vectors, teacher=bags, comm=comm)
    clustering = _clustering(vectors, out, policy, comm, labels, say)
    distinct = _distinct(scan, out, policy, comm) if policy.duplicate_cosine else None
    figures = Reduction(
        shards, scan, out, policy, comm, clustering=clustering, distinct=distinct
    ).run()
    say(f"{figures['epoch']:,} of {figures['samples']:,} samples in an epoch")
    control = Policy(seed=policy.seed + 1)  # as many samples, whatever they show
    count = figures["epoch"]
    random = Reduction(shards, scan, out / RANDOM, control, comm, exactly=count).run()
    figures["random"] = random["epoch"]
    agreed(comm, (lambda: _write(out, policy, figures)) if comm.is_main else lambda: None)
    return figures


def write_comparison(run: Path, out: Path, seeds: int, comm: Comm) -> Path:
    """OUT/compare.yaml: what the selection does to a run, at the steps that this run has."""
    if not run.exists():
        raise ConfigError(f"there is no run file {run}")
    values = {
        "workdir": str(out / "compare"),
        "base": str(run),
        "variants": {
            "full": [],
            "reduced": [f"data.select={out}"],
            "random": [f"data.select={out / RANDOM}"],
        },
        "seeds": list(range(seeds)),
    }
    path = out / "compare.yaml"
    text = yaml.safe_dump(values, sort_keys=False)
    agreed(comm, (lambda: write_whole(path, text.encode())) if comm.is_main else lambda: None)
    return path


def write_shards(spec: str, selection: Path, out: Path, comm: Comm) -> dict[str, int]:
    """Copy the selected samples, every member as it is, into a shard for each that has any."""
    shards = ShardSet.open(spec)
    own = range(comm.rank, len(shards.shards), comm.world_size)
    written, bad = [0], [0]
    agreed(comm, (lambda: _begin(selection, out)) if comm.is_main else lambda: None)

    def copy() -> None:
        for row in counted(own, "writing", total=len(own), unit="shards"):
            folder = out / shards.sets[row] if shards.sets[row] else out
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{Path(shards.shards[row]).stem}.tar"
            kept = np.flatnonzero(read_shares(selection, shards.names[row]) > 0)
            if len(kept) and not Path(index_path(str(path))).exists():
                bad[0] += _copy(shards, row, kept, path)
            written[0] += len(kept)

    agreed(comm, copy)
    sums = comm.gather_json([written[0], bad[0]])
    return {"samples": sum(n for n, _ in sums), "unreadable": sum(n for _, n in sums)}


def table_of(policy: Policy, figures: Mapping[str, Any]) -> str:
    kept, counts = np.array(figures["kept"]), np.array(figures["counts"])
    share = np.divide(kept, counts, out=np.zeros(len(kept)), where=counts > 0)[counts > 0]
    quantiles = np.quantile(share, [0, 0.25, 0.5, 0.75, 1]) if len(share) else np.zeros(5)
    rows = [
        ("rule", policy.rule),
        ("samples of the shards", f"{figures['samples']:,}"),
        ("that may be kept", f"{figures['candidates']:,}"),
        ("in an epoch", f"{figures['epoch']:,}"),
        ("in an epoch of the random control", f"{figures['random']:,}"),
        ("clusters with members", f"{figures['clusters']:,}"),
        ("kept of a cluster: least, quarter, half, most", _percent(quantiles)),
    ]
    if figures["gate"]:
        gate = figures["gate"]
        rows.append(
            ("gate", f"cosine {gate['least_score']:.4f}; {gate['share_below']:.2%} are below")
        )
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| figure | value |", "| --- | --- |", *lines])


def _percent(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{100 * value:.0f} %" for value in values)


def _clustering(
    vectors: Path, out: Path, policy: Policy, comm: Comm, labels: Path | None, say: Say
) -> Clustering | None:
    """The clusters of the samples: those in `labels`, or made here of a store of vectors."""
    if labels is None:
        if policy.clusters is None:
            return None
        job = ClusterJob(
            kmeans=KMeansConfig(
                clusters=policy.clusters,
                iterations=policy.iterations,
                spherical=True,
                seed=policy.seed,
                assignment="two_level" if policy.clusters > _EXACT_UP_TO else "exact",
            ),
            per_sample=1,
        )
        labels = cluster_store(vectors, out / CLUSTERS, job, comm, say=say)
    centroids = read_tensors(labels / CENTROIDS, of="centroids")["centroids"].numpy()
    return Clustering(labels, groups_of(centroids, policy.merge_cosine))


_EXACT_UP_TO = 4096


def _distinct(scan: Path, out: Path, policy: Policy, comm: Comm) -> Path:
    """Write the ids of the samples that are no duplicates, sorted."""
    points = StoredPoints(EmbeddingStore.open(scan / IMAGES), comm, unit_length=True)
    assert policy.duplicate_cosine is not None
    left = without_duplicates(points, policy.duplicate_cosine, comm, seed=policy.seed)
    ids = comm.gather_rows(left.ids(0, len(left)).to(comm.device)).cpu().numpy()
    path = out / DISTINCT

    def write() -> None:
        data = BytesIO()
        np.save(data, np.sort(ids))
        write_whole(path, data.getvalue())

    agreed(comm, write if comm.is_main else lambda: None)
    return path


def _write(out: Path, policy: Policy, figures: dict[str, Any]) -> None:
    whole = {"policy": policy.model_dump(mode="json"), **figures}
    write_whole(out / "reduce.json", (json.dumps(whole, indent=1) + "\n").encode())
    write_whole(out / "reduce.md", (table_of(policy, figures) + "\n").encode())
    _plot(figures, out / "reduce.png")


def _plot(figures: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second to import

    kept, counts = np.array(figures["kept"]), np.array(figures["counts"])
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    there = counts > 0
    axes.loglog(counts[there], np.maximum(kept[there], 0.5), ".", markersize=4)
    line = np.array([counts[there].min(), counts[there].max()])
    axes.loglog(line, line, "--", color="gray", linewidth=1, label="all")
    axes.set_xlabel("samples of a cluster")
    axes.set_ylabel("kept of them")
    axes.legend()
    figure.savefig(path, dpi=120)


def _begin(selection: Path, out: Path) -> None:
    """Write down whose samples these are, or compare it with what was."""
    out.mkdir(parents=True, exist_ok=True)
    mine, there = (selection / HEADER).read_bytes(), out / HEADER
    if there.exists() and there.read_bytes() != mine:
        raise ConfigError(f"{out} holds the samples of another selection; give another folder")
    write_whole(there, mine)


def _copy(shards: ShardSet, row: int, kept: NDArray[np.int64], path: Path) -> int:
    """Write one shard; how many samples could not be read."""
    first, bad = sum(shards.sizes[:row]), 0
    partial = path.with_suffix(".tar.partial")
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in kept.tolist():
            try:
                sample = shards.read(first + number)
            except DamagedSample:
                bad += 1
                continue
            for suffix, data in sample.fields.items():
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
    os.replace(partial, path)
    write_index(str(path))
    return bad
