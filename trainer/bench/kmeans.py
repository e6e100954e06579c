"""k-means beside faiss, scikit-learn and superkmeans: same points, first centroids and passes.

    peers    every side at three sizes (small ones without --full)
    curve    inertia against CPU time at one number of clusters, for several numbers of probes
    growth   time and memory over the number of clusters, and over the number of points
    ranks    the same problem on one rank, two ranks, ..., one thread each

With --million FOLDER something else runs: a million clusters of points on disk, out of core.
superkmeans takes part where it is installed; it draws its own first centroids.
"""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.bench import million
from trainer.bench.kmeans_plot import plot
from trainer.bench.kmeans_worker import Case, Size
from trainer.bench.launch import launch
from trainer.bench.options import number_list

TWO_LEVEL = {"ours-two-level": 9, "ours-two-level-fast": 3}
"""Probes of the two-level sides."""
SIDES = ("ours-exact", *TWO_LEVEL, "faiss", "sklearn", "superkmeans")
STUDIES = ("peers", "curve", "growth", "ranks")
SIZES = (Size(200_000, 2048, 128), Size(200_000, 8192, 128), Size(100_000, 4096, 512))
QUICK = (Size(20_000, 1024, 64),)
CURVE = Size(262_144, 65_536, 64)
GROWTH = Size(50_000, 1024, 64)
"""The smallest: then K, or N, is 2, 4 and 8 times as large."""


def add_options(command: ArgumentParser) -> None:
    command.add_argument("--study", choices=STUDIES, default="peers")
    command.add_argument("--full", action="store_true", help="peers at large sizes: many minutes")
    command.add_argument("--sides", nargs="+", choices=SIDES, default=installed(SIDES))
    command.add_argument("--rounds", type=int, default=2, help="runs of each side; the best counts")
    command.add_argument("--threads", type=int, default=1, help="of each process")
    command.add_argument("--iterations", type=int, help="updates of the centroids; 5, million: 3")
    command.add_argument("--points", type=int, help="instead of the study's own number")
    command.add_argument("--clusters", type=int, help="instead of the study's own, or a million")
    command.add_argument("--dim", type=int, help="instead of the study's own")
    command.add_argument("--probes", type=number_list, default=(4, 8, 16, 32), help="of the curve")
    command.add_argument("--ranks", type=number_list, default=(1, 2), help="as in 1,2,4")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the study into it")
    command.add_argument("--million", type=Path, metavar="FOLDER", help="out of core, made there")
    starts = ("sampled", "hierarchical")
    command.add_argument("--init", dest="start", choices=starts, default="sampled")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    if options.million is not None:
        return million.run(options.million, _million(options))
    rows = measured(cases_of(options), threads=options.threads, rounds=options.rounds)
    if options.plot:
        plot(rows, options.plot)
    return rows


def _million(options: Namespace) -> million.Million:
    """Four points a cluster, of half as many components, whatever the number of clusters."""
    usual = million.Million()
    clusters = options.clusters or usual.clusters
    return usual._replace(
        points=options.points or 4 * clusters,
        dim=options.dim or usual.dim,
        clusters=clusters,
        components=max(clusters // 2, 1),
        iterations=options.iterations or usual.iterations,
        start=options.start,
        threads=options.threads,
    )


def installed(sides: Sequence[str]) -> tuple[str, ...]:
    """Without superkmeans where it can't be imported; the other packages are required."""
    there = importlib.util.find_spec("superkmeans") is not None
    return tuple(side for side in sides if there or side != "superkmeans")


def cases_of(options: Namespace) -> list[tuple[Case, int]]:
    """The runs of a study, each with its number of ranks."""
    how = {"iterations": options.iterations or 5}
    if options.study == "ranks":
        sizes = [_resized(QUICK[0], options)]
        sides = [side for side in options.sides if side.startswith("ours")]
        return [(c, n) for n in options.ranks for c in _peers(sizes, sides, **how)]
    if options.study == "curve":
        size = _resized(CURVE, options)
        exact = [side for side in ("ours-exact", "faiss") if side in options.sides]
        ours = [
            Case(name="ours-two-level", side="ours", size=size, probes=probes, **how)
            for probes in options.probes
        ]
        return [(case, 1) for case in [*_peers([size], exact, **how), *ours]]
    if options.study == "growth":
        sizes = _growing(_resized(GROWTH, options))
    else:
        sizes = [_resized(size, options) for size in (SIZES if options.full else QUICK)]
    return [(case, 1) for case in _peers(sizes, options.sides, **how)]


def _peers(sizes: Sequence[Size], sides: Sequence[str], **how: Any) -> list[Case]:
    return [
        Case(name=name, side=name.split("-")[0], size=size, probes=TWO_LEVEL.get(name), **how)
        for size in sizes
        for name in sides
    ]


def _resized(size: Size, options: Namespace) -> Size:
    given = {name: getattr(options, name) for name in size._fields}
    return size._replace(**{name: value for name, value in given.items() if value is not None})


def _growing(size: Size) -> list[Size]:
    """In K at the smallest N, then in N at the smallest K."""
    in_clusters = [size._replace(clusters=size.clusters * factor) for factor in (1, 2, 4, 8)]
    return in_clusters + [size._replace(points=size.points * factor) for factor in (2, 4, 8)]


def measured(
    cases: Sequence[tuple[Case, int]], *, threads: int = 1, rounds: int = 2
) -> list[dict[str, Any]]:
    """A row for each case; they take turns and each keeps its fastest round.

    seconds: by the clock; cpu_seconds: of all threads and ranks, what to compare on a busy machine;
    rank_cpu_seconds: of the busiest rank; ratio_to_faiss: faiss's cpu_seconds over the side's;
    extra_bytes: the most memory held above points and first centroids (None where /proc doesn't
    tell), of one rank.
    """
    best: dict[int, dict[str, Any]] = {}
    for _ in range(rounds):
        for number, (case, ranks) in enumerate(cases):
            arguments = ("trainer.bench.kmeans_worker", case.model_dump_json())
            (row,) = launch(*arguments, ranks=ranks, threads=threads)
            if number not in best or row["cpu_seconds"] < best[number]["cpu_seconds"]:
                best[number] = row
    return [_compared(row, list(best.values())) for row in best.values()]


def _compared(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Beside faiss at the same size and, of several ranks, beside one."""
    same = [r for r in rows if all(r[name] == row[name] for name in Size._fields)]
    ratios: dict[str, float] = {}
    peer = next((r for r in same if r["name"] == "faiss"), None)
    if peer is not None:
        ratios["ratio_to_faiss"] = round(peer["cpu_seconds"] / row["cpu_seconds"], 3)
        ratios["inertia_above_faiss"] = round(row["inertia"] / peer["inertia"] - 1.0, 6)
    alone = next((r for r in same if r["name"] == row["name"] and r["ranks"] == 1), row)
    if row["ranks"] > 1:
        ratios["speed_to_one_rank"] = round(alone["seconds"] / row["seconds"], 3)
        busiest = alone["rank_cpu_seconds"] / row["rank_cpu_seconds"]
        ratios["cpu_speed_to_one_rank"] = round(busiest, 3)
    return {**row, **ratios}
