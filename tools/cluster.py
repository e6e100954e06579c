"""Cluster the vectors of an embedding store: centroids, the clusters of every sample, figures.

  python tools/cluster.py cache/embeddings/clip --clusters 1000 --out runs/clusters
  torchrun --nproc-per-node 8 tools/cluster.py STORE --clusters 1000000 --two-level \
      --init hierarchical --spherical --out OUT
  python tools/cluster.py --plan --points 400000000 --dim 768 --ranks 8 --peak-tflops 989 \
      --clusters 1000000

Centroids that are too many for --centroid-gib of a rank lie on a grid of ranks (--grid).
On any number of ranks, to the same bytes. Run it again after it was killed: it goes on after its
last whole iteration. `ClusterLabels.open(OUT)` serves the clusters by sample id.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.bench.table import format_rows
from trainer.cluster.plan import Plan, measured_peak, plan
from trainer.cluster.problem import KMeansConfig
from trainer.comm import Comm
from trainer.command import parser_of, run_command, said_once
from trainer.errors import ConfigError
from trainer.programs.cluster import ClusterJob, cluster_store, read_figures
from trainer.programs.cluster_report import measure_quality, write_page
from trainer.store import EmbeddingStore


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.plan:
        print(_plan(arguments, Comm.solo()))
        return
    if arguments.store is None or arguments.out is None:
        raise ConfigError("give STORE and --out FOLDER, or --plan")
    comm = Comm.from_environment()
    say = said_once(comm)
    say(str(_plan(arguments, comm)))
    out: Path = arguments.out
    cluster_store(arguments.store, out, _job(arguments), comm, say=say)
    quality = measure_quality(
        out,
        comm,
        images=arguments.images,
        classes=arguments.classes,
        compare=arguments.compare,
    )
    if comm.is_main:
        figures = {k: v for k, v in read_figures(out).items() if not isinstance(v, list)}
        rows = [{"figure": name, "value": v} for name, v in {**figures, **quality}.items()]
        print(format_rows(rows))
        if arguments.images:
            print(f"look at {write_page(out, arguments.images, shown=arguments.shown)}")
        print(f"next: bash launch/local.sh launch/runs/mlcd_tiny.yaml recipe.labels={out}")


def _job(arguments: argparse.Namespace) -> ClusterJob:
    return ClusterJob(
        kmeans=_kmeans(arguments),
        per_sample=arguments.per_sample,
        min_cosine=arguments.min_cosine,
        which=arguments.which,
        warm_start=arguments.warm_start,
        duplicate_cosine=arguments.duplicate_cosine,
    )


def _kmeans(arguments: argparse.Namespace) -> KMeansConfig:
    return KMeansConfig(
        clusters=arguments.clusters,
        iterations=arguments.iterations,
        spherical=arguments.spherical,
        seed=arguments.seed,
        tolerance=arguments.tolerance,
        backend=arguments.backend,
        start=arguments.start,
        assignment="two_level" if arguments.two_level else "exact",
        cells=arguments.cells,
        probes=arguments.probes,
        grid=arguments.grid,
        centroid_gib=arguments.centroid_gib,
    )


def _plan(arguments: argparse.Namespace, comm: Comm) -> Plan:
    points, dim, ranks = arguments.points, arguments.dim, arguments.ranks or comm.world_size
    if arguments.store is not None:
        store = EmbeddingStore.open(arguments.store)
        points, dim = len(store), store.dim
    if points is None or dim is None:
        raise ConfigError("give STORE, or --points and --dim")
    tflops = arguments.peak_tflops
    peak = measured_peak(comm.device) if tflops is None else tflops * 1e12
    return plan(
        _kmeans(arguments),
        points=points,
        dim=dim,
        ranks=ranks,
        point_bytes=0,
        peak_flops=peak,
        share_of_peak=arguments.share_of_peak,
        device=comm.device,
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    parser.add_argument("store", type=Path, nargs="?", help="folder written by tools/embed.py")
    parser.add_argument("--clusters", type=int, required=True)
    parser.add_argument("--out", type=Path, help="folder for the result and the state")
    how = parser.add_argument_group("how to cluster")
    how.add_argument("--iterations", type=int, default=20, help="updates at most")
    how.add_argument("--tolerance", type=float, default=1e-4, help="stop at a smaller gain")
    how.add_argument("--seed", type=int, default=1234)
    how.add_argument("--spherical", action="store_true", help="samples, centroids of length one")
    how.add_argument("--two-level", action="store_true", help="search the nearest cells only")
    how.add_argument("--cells", type=int, help="of the two-level search; default sqrt(K)")
    how.add_argument("--probes", type=int, default=8, help="cells a sample looks into, on average")
    how.add_argument(
        "--init", dest="start", choices=["sampled", "parallel", "hierarchical"], default="sampled"
    )
    how.add_argument(
        "--grid", type=int, help="ranks that share one table of centroids; default what fits"
    )
    how.add_argument(
        "--centroid-gib", type=float, default=16.0, help="of a rank, for centroids and their sums"
    )
    how.add_argument("--warm-start", type=Path, metavar="FILE", help="centroids.safetensors")
    how.add_argument("--backend", choices=["torch", "faiss"], default="torch")
    how.add_argument("--which", type=int, default=0, help="of the vectors of a sample")
    how.add_argument("--duplicate-cosine", type=float, help="leave near-duplicates out, as 0.98")
    labels = parser.add_argument_group("labels")
    labels.add_argument("--per-sample", type=int, default=8, help="clusters listed per sample")
    labels.add_argument("--min-cosine", type=float, help="list only clusters as near as that")
    look = parser.add_argument_group("quality")
    look.add_argument("--images", metavar="SHARDS", help="shards of the samples: write a page")
    look.add_argument("--classes", metavar="KEY", help="json key of the class, for NMI and ARI")
    look.add_argument("--compare", type=Path, metavar="OUT", help="another result, for agreement")
    look.add_argument("--shown", type=int, default=200, help="clusters on the page")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--plan", action="store_true", help="say what it will cost, and stop")
    cost.add_argument("--points", type=int, help="for a plan without a store")
    cost.add_argument("--dim", type=int, help="likewise")
    cost.add_argument("--ranks", type=int, help="likewise")
    cost.add_argument("--peak-tflops", type=float, help="of one rank; measured if not given")
    cost.add_argument("--share-of-peak", type=float, default=0.4)
    return parser


if __name__ == "__main__":
    run_command(main)
