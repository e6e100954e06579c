"""Lloyd's k-means over points that stay on the rank that made them.

Every quantity that decides anything is a sum of whole numbers or a float64 expression of fixed
order: points enter the sums as multiples of a power of two chosen so that no sum reaches 2^53,
where float64 is exact in any order (and several times as fast as int64 here); and `assign` is
exact. The centroids are therefore bit for bit the same for every world size, block size and order
of points. Where they are too many for one rank they lie on a grid of ranks (`grid.py`), and that
changes no bit either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.cluster.faiss_peer import faiss_centroids
from trainer.cluster.grid import Grid
from trainer.cluster.layout import laid_out
from trainer.cluster.points import Points, Resident
from trainer.cluster.problem import KMeansConfig, KMeansResult, Problem, pose
from trainer.cluster.progress import Observer, Silent, State
from trainer.cluster.ranks.together import together
from trainer.cluster.search import two_level
from trainer.cluster.search.assign import ROW_BLOCK, assign, assign_block, ordered_sum, prepare
from trainer.cluster.start.drawn import starting_points
from trainer.cluster.start.hierarchical import hierarchical_start
from trainer.cluster.start.kmeans_parallel import parallel_start
from trainer.cluster.start.sliced import held_starting_points
from trainer.cluster.update import refilled, unit_or
from trainer.comm import Comm
from trainer.errors import ConfigError

__all__ = ["KMeansConfig", "KMeansResult", "Observer", "State", "cluster", "cluster_on", "kmeans"]


_CENTROIDS_PER_CELL = 64
"""That the coarse k-means of the centroids looks at."""


class _Sums(NamedTuple):
    """One pass over the points."""

    labels: Int64[Tensor, " n"]
    sums: Float64[Tensor, "owned d"]
    """Whole numbers: sums of round(x * scale), of the clusters that this rank owns."""
    counts: Int64[Tensor, " k"]
    """Of all clusters."""


def kmeans(
    points: Float[Tensor, "n d"],
    ids: Int64[Tensor, " n"],
    config: KMeansConfig,
    comm: Comm,
    *,
    initial: Float[Tensor, "k d"] | None = None,
    observer: Observer | None = None,
) -> KMeansResult:
    """Cluster the ranks' points together: Lloyd's iterations from K points chosen by hash of id.

    `points` and `ids` are this rank's and may be empty; every rank must call. Ids name the points
    whatever rank holds them; rows that only fill up (id -1) must be left out by the caller.
    `initial` (equal on all ranks) replaces the start of the first restart.
    The result equals, bit for bit, that of one rank holding all points.
    DataError names the sample of a non-finite value; ConfigError if there are fewer points than
    clusters. Holds float64 sums of its K x d, or of a slice (`KMeansConfig.grid`), per rank and
    nothing of size N x K; the resulting centroids are whole on every rank.
    """
    return cluster(Resident(points, ids), config, comm, initial=initial, observer=observer)


def cluster(
    points: Points,
    config: KMeansConfig,
    comm: Comm,
    *,
    initial: Float[Tensor, "k d"] | None = None,
    resume: State | None = None,
    observer: Observer | None = None,
) -> KMeansResult:
    """As `kmeans`, for points that may be on disk, and watched by an observer.

    `resume` goes on after the update that the state tells of; the result is, bit for bit, that of
    a run that was never interrupted. It needs `restarts` of one. States have the centroids that a
    rank holds, as those of `cluster_on`.
    """
    grid = laid_out(config, points.dim, comm)
    facts = None if resume is None else resume.facts
    problem = pose(points, config, comm, grid, initial=initial, facts=facts)
    found = cluster_on(problem, resume, observer)
    return found._replace(centroids=grid.whole(found.centroids))


def cluster_on(
    problem: Problem, resume: State | None = None, observer: Observer | None = None
) -> KMeansResult:
    """As `cluster`, of a problem that `pose` has posed on a grid: centroids that are given, told to
    the observer or returned are those that this rank holds."""
    if resume is not None:
        _check_resumable(problem, resume)
    if problem.config.backend == "faiss":
        return _by_faiss(problem)
    observer = observer or Silent()
    results = (_lloyd(problem, state, observer) for state in _starts(problem, resume, observer))
    return min(results, key=lambda result: result.inertia)  # of equal ones the first


def _check_resumable(problem: Problem, resume: State) -> None:
    if problem.config.restarts != 1 or problem.config.backend != "torch":
        raise ConfigError("only backend torch with one restart goes on where it was interrupted")
    if resume.centroids.shape != problem.held_shape:
        raise ConfigError(
            f"the centroids to go on from are {tuple(resume.centroids.shape)} and must be"
            f" {problem.held_shape}"
        )


def _starts(problem: Problem, resume: State | None, observer: Observer) -> Iterator[State]:
    """Where each restart begins; told to the observer unless it is from where a run goes on."""
    if resume is not None:
        yield resume
        return
    for restart in range(problem.config.restarts):
        state = _start(problem, restart)
        observer.updated(state)
        yield state


def _start(problem: Problem, restart: int) -> State:
    given = problem.initial if restart == 0 else None
    start = _starting_table(problem, restart) if given is None else given
    start = start.to(problem.comm.device, torch.float32)
    if problem.config.spherical:
        start = unit_or(start, instead=start)
    return State(problem.facts, start, [], 0)


def _starting_table(problem: Problem, restart: int) -> Tensor:
    """The rows that this rank holds. Only sampled ones are never whole on a rank."""
    config, grid = problem.config, problem.grid
    if config.start == "sampled" and grid.scorers.world_size > 1:
        return held_starting_points(problem, restart)
    alone = problem._replace(config=config.model_copy(update={"grid": 1}))
    if config.start == "parallel":
        return grid.part(parallel_start(alone, restart))
    if config.start == "hierarchical":
        return hierarchical_start(alone, restart, cluster)
    return starting_points(problem, restart)


def _lloyd(problem: Problem, state: State, observer: Observer) -> KMeansResult:
    config = problem.config
    before: Tensor | None = None
    while True:
        centroids, objective = state.centroids, state.objective
        found = _pass(problem, centroids)
        value = _objective(problem, found, centroids)
        observer.scored(len(objective), value, _moved_share(problem, found.labels, before))
        if len(objective) == config.iterations or _settled(objective, value, config.tolerance):
            break
        before = found.labels
        moved, splits = _updated(problem, found, centroids)
        state = State(problem.facts, moved, [*objective, value], state.repaired + splits)
        if not problem.grid.scorers.any(not torch.equal(moved, centroids)):
            break
        observer.updated(state)
    inertia = value * problem.num_points
    return KMeansResult(
        state.centroids, found.labels, found.counts, state.objective, state.repaired, inertia
    )


def _moved_share(problem: Problem, labels: Tensor, before: Tensor | None) -> float | None:
    """Share of all points whose label is another than in the pass before."""
    if before is None:
        return None
    changed = problem.comm.sum((labels != before).sum()[None])
    return int(changed) / problem.num_points


def _by_faiss(problem: Problem) -> KMeansResult:
    """faiss's centroids, then one exact pass of our own for labels, counts and inertia."""
    initial = problem.initial
    if initial is None and problem.config.start != "sampled":
        initial = _starting_table(problem, 0)
    centroids, objective = faiss_centroids(problem, initial)
    found = _pass(problem, centroids)
    inertia = _objective(problem, found, centroids) * problem.num_points
    return KMeansResult(centroids, found.labels, found.counts, objective, 0, inertia)


def _settled(objective: list[float], value: float, tolerance: float) -> bool:
    """True when the last update lowered the objective, but by less than asked for."""
    if not objective or tolerance == 0.0:
        return False
    return 0.0 <= objective[-1] - value < tolerance * objective[-1]


def _pass(problem: Problem, centroids: Tensor) -> _Sums:
    """Assign every point and add it, as whole numbers, to its cluster on the ranks that hold that;
    then reduce."""
    grid, comm, points = problem.grid, problem.comm, problem.points
    size, nearest_of = _assigner(problem, centroids)
    sums = torch.zeros((grid.padded, points.dim), dtype=torch.float64, device=comm.device)
    counts = torch.zeros(grid.padded, dtype=torch.int64, device=comm.device)
    labels = torch.empty(len(points), dtype=torch.int64, device=comm.device)
    for step in together(points, size, comm, scorers=grid.scorers):
        nearest = nearest_of(step.points)
        labels[step.place] = nearest[step.mine]
        block, rows = _of_held(step.points, nearest, grid)
        _add(sums, block, rows, problem.scale)
        counts.index_add_(0, rows, torch.ones_like(rows))
    held = grid.copies.sum(counts)[: grid.held.stop - grid.held.start]
    return _Sums(labels, grid.copies.reduce_scatter(sums), grid.whole(held))


def _add(sums: Tensor, points: Tensor, rows: Tensor, scale: float) -> None:
    """Add every point, as whole numbers, to its row of the sums."""
    # little at once: the memory of large float64 copies would be mapped anew every time
    for some, owners in zip(points.split(ROW_BLOCK), rows.split(ROW_BLOCK), strict=True):
        sums.index_add_(0, owners, (some.double() * scale).round_())


def _of_held(points: Tensor, nearest: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The points whose cluster this rank holds, and the places of these clusters."""
    if grid.scorers.world_size == 1:
        return points, nearest
    inside = (nearest >= grid.held.start) & (nearest < grid.held.stop)
    return points[inside], nearest[inside] - grid.held.start


def _assigner(problem: Problem, centroids: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many points of a rank to take at once, and the function that labels them, and with them
    those of the ranks that score together."""
    config, scorers = problem.config, problem.grid.scorers
    if config.assignment == "exact":
        table = prepare(centroids, precision=problem.precision, scorers=scorers)
        return -(-config.row_block // scorers.world_size), partial(
            assign_block, table=table, column_block=config.column_block
        )
    cells = coarse_cells(centroids, config, problem.comm)
    rows = max(config.row_block, two_level.rows_at_once(centroids.shape[1], centroids.device))
    return rows, partial(two_level.assign_two_level, cells=cells)


def coarse_cells(centroids: Tensor, config: KMeansConfig, comm: Comm) -> two_level.Cells:
    """A k-means of the centroids, or of every so-manieth of very many; each rank's share of them
    on that rank."""
    count = min(config.cells or math.isqrt(config.clusters), config.clusters)
    coarse = KMeansConfig(clusters=count, iterations=4, seed=config.seed, precision="float32")
    first, last = comm.row_range(config.clusters)
    own = centroids[first:last]
    ids = torch.arange(first, last, device=centroids.device)
    some = ids % max(config.clusters // (_CENTROIDS_PER_CELL * count), 1) == 0
    centres = kmeans(own[some], ids[some], coarse, comm).centroids
    cell_of = comm.gather_rows(assign(own, centres))
    return two_level.group_into_cells(centroids, centres, cell_of, probes=config.probes)


def _objective(problem: Problem, found: _Sums, centroids: Tensor) -> float:
    """Mean of |x - c|^2 = (sum |x|^2 + sum_k n_k |c_k|^2 - 2 c_k . s_k) / N, from exact sums."""
    grid = problem.grid
    own = centroids[grid.owned_here].double()
    means = found.sums[: len(own)] / problem.scale
    terms = ordered_sum((found.counts[grid.owned, None] * own - 2.0 * means) * own)
    everyone = grid.whole(grid.copies.gather_rows(terms))
    total = problem.facts.sum_of_squares + float(ordered_sum(everyone[None].clone()))
    return max(total, 0.0) / problem.num_points


def _updated(problem: Problem, found: _Sums, centroids: Tensor) -> tuple[Tensor, int]:
    """Means of the clusters held, empty ones refilled; how many of all were."""
    grid, spherical = problem.grid, problem.config.spherical
    kept = centroids[grid.owned_here]
    own = centroids.new_zeros((found.sums.shape[0], centroids.shape[1]))
    counts = found.counts[grid.owned, None].double()
    means = (found.sums[: len(kept)] / problem.scale / counts.clamp(min=1)).float()
    means = torch.where(counts > 0, means, kept)
    own[: len(kept)] = unit_or(means, instead=kept) if spherical else means
    held = grid.copies.all_gather(own)[: len(centroids)]
    moved, splits = refilled(held, found.counts, first=grid.held.start, scorers=grid.scorers)
    return (unit_or(moved, instead=moved) if spherical and splits else moved), splits
