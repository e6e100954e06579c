"""k-means||: a start whose points lie far from each other, in a few passes instead of K.

Bahmani et al., "Scalable k-means++", arXiv 1203.6402, algorithm 2. A point's chance depends on a
hash of its id, and costs are summed as whole numbers: the start is the same on any ranks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.cluster.problem import Problem, whole_number_scale
from trainer.cluster.ranks.together import together
from trainer.cluster.search.assign import assign_block, pair_distances, prepare
from trainer.cluster.start.drawn import lexicographic, smallest_hashes, starting_points
from trainer.errors import ConfigError
from trainer.hashing import hash_bits, key_of, uniform, uniform_of

ROUNDS = 4
MOST_CLUSTERS = 50_000


def parallel_start(problem: Problem, restart: int) -> Float[Tensor, "k d"]:
    """About K points in each of four rounds, each with a chance in proportion to its squared
    distance to those before; of these K by k-means++, weighted by how many points are near.

    Holds 8 bytes per local point. ConfigError above 50000 clusters: choosing among 4 K candidates
    takes K steps one after the other.
    """
    config, comm = problem.config, problem.comm
    if config.clusters > MOST_CLUSTERS:
        raise ConfigError(
            f"start: parallel takes at most {MOST_CLUSTERS} clusters, not {config.clusters};"
            " use start: hierarchical"
        )
    seed = key_of(config.seed, "kmeans parallel", restart)
    _, places = smallest_hashes(problem.points, 1, seed, comm)
    candidates = comm.gather_rows(problem.points.take(places).to(comm.device, torch.float32))[:1]
    costs = torch.full((len(problem.points),), torch.inf, dtype=torch.float64)
    newest = candidates
    for number in range(ROUNDS):
        _lower_costs(problem, newest, costs)
        newest = _drawn(problem, costs, key_of(seed, number))
        candidates = torch.cat([candidates, newest])
        if len(newest) == 0:
            break
    candidates = torch.unique(candidates, dim=0)
    if len(candidates) < config.clusters:
        return starting_points(problem, restart)
    weights = _weights(problem, candidates)
    chosen: Tensor = torch.zeros(config.clusters, dtype=torch.int64, device=comm.device)
    if comm.is_main:
        chosen = spread_out(candidates, weights, config.clusters, seed=seed)
    chosen = comm.broadcast(chosen)
    start: Tensor = candidates[chosen]
    return start


def _lower_costs(problem: Problem, centres: Tensor, costs: Tensor) -> None:
    """Each local point's squared distance to its nearest centre, where that is nearer."""
    table = prepare(centres)
    for step in together(problem.points, problem.config.row_block, problem.comm):
        near = pair_distances(step.points, centres[assign_block(step.points, table)])
        costs[step.place] = torch.minimum(costs[step.place], near.cpu())


def _drawn(problem: Problem, costs: Float64[Tensor, " n"], key: int) -> Float[Tensor, "m d"]:
    """Points with chance K x cost / total cost, of all ranks, in an order of their own."""
    points, comm = problem.points, problem.comm
    bound = 4.0 * points.dim * problem.facts.largest**2
    scale = whole_number_scale(problem.num_points, bound, bits=62)
    whole = (costs * scale).round().long().sum()[None]
    total = int(comm.sum(whole.to(comm.device))) / scale
    ids = points.ids(0, len(points)).cpu()
    places = (uniform(ids, key) * total < problem.config.clusters * costs).nonzero()[:, 0]
    rows = comm.gather_rows(points.take(places).to(comm.device, torch.float32))
    keys = comm.gather_rows(hash_bits(ids[places], key).to(comm.device))
    return rows[lexicographic(keys, rows)]


def _weights(problem: Problem, candidates: Tensor) -> Int64[Tensor, " m"]:
    """How many points, on all ranks, are nearest to each candidate."""
    table = prepare(candidates)
    counts = torch.zeros(len(candidates), dtype=torch.int64, device=candidates.device)
    for step in together(problem.points, problem.config.row_block, problem.comm):
        nearest = assign_block(step.points, table)
        counts.index_add_(0, nearest, torch.ones_like(nearest))
    return problem.comm.sum(counts)


def spread_out(
    candidates: Float[Tensor, "m d"], weights: Int64[Tensor, " m"], count: int, *, seed: int
) -> Int64[Tensor, " count"]:
    """k-means++ on weighted rows: each next one with chance in proportion to weight x squared
    distance to those before. Rows are distinct; where all chances are zero the first left wins."""
    exact = candidates.double()
    chances = weights.double()
    costs = torch.full_like(chances, torch.inf)
    taken = torch.zeros_like(weights, dtype=torch.bool)
    chosen = []
    for number in range(count):
        sums = chances.masked_fill(taken, 0.0).cumsum(0)
        draw = uniform_of(number, seed) * float(sums[-1])
        pick = int(torch.searchsorted(sums, draw, right=True)) if float(sums[-1]) > 0 else -1
        if pick < 0 or pick >= len(taken) or bool(taken[pick]):
            pick = int((~taken).nonzero()[0])
        chosen.append(pick)
        taken[pick] = True
        costs = torch.minimum(costs, (exact - exact[pick]).square().sum(1))
        chances = weights * costs
    return torch.tensor(chosen, device=candidates.device)
