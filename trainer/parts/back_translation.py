"""Groups found in one space as prototypes in another (ProtoCLIP, arXiv 2206.10996, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.kmeans import KMeansResult
from trainer.cluster.translate import group_means
from trainer.comm import Comm
from trainer.losses.constant_prototypes import (
    PrototypeTable,
    prototype_table,
    target_figures,
    temperature_of_entropy,
)
from trainer.losses.units import unit_rows
from trainer.parts.teacher import Student


class TableOptions(NamedTuple):
    """What a table of prototypes is made of."""

    back_translation: bool = True
    """The mean of the students' features in a group is its prototype; else its own centroid."""
    unit_centroids: bool = False
    """Scale centroids to length one before soft targets are made of them."""
    unit_tables: bool = False
    """Scale prototypes to length one."""
    keep_empty: bool = False
    """Empty groups stay, as classes of logit zero."""


def episode_table(
    features: Float[Tensor, "samples dim"],
    labels: Int64[Tensor, " samples"],
    centroids: Float[Tensor, "local teacher_dim"],
    options: TableOptions,
    comm: Comm,
    *,
    temperature: float,
) -> PrototypeTable:
    """P from the students' features in the groups, T from the groups' centroids.

    Features and labels are this rank's; so are the rows of `centroids`, `comm.row_range` of all.
    """
    num_groups = int(comm.sum(torch.tensor(centroids.shape[0], device=comm.device)))
    means = group_means(features, labels, num_groups=num_groups, comm=comm)
    prototypes = means.rows if options.back_translation else centroids
    everyone = torch.ones_like(means.counts, dtype=torch.bool)
    return prototype_table(
        unit_rows(prototypes) if options.unit_tables else prototypes,
        unit_rows(centroids) if options.unit_centroids else centroids,
        valid=everyone if options.keep_empty else means.counts > 0,
        num_prototypes=num_groups,
        temperature=temperature,
        comm=comm,
    )


Temperatures = Mapping[Student, float]
"""Of the soft targets, by the space whose groups they are."""


def temperatures_of(
    clustered: Mapping[Student, KMeansResult],
    options: TableOptions,
    comm: Comm,
    *,
    temperature: float,
    entropy: float | None,
) -> Temperatures:
    """The same for every space, or the one that gives its targets this entropy in nats."""
    if entropy is None:
        return dict.fromkeys(clustered, temperature)
    found = {}
    for space, result in clustered.items():
        groups = _groups(result, options, comm)
        found[space] = temperature_of_entropy(**groups, entropy=entropy, comm=comm)
    return found


def softness(
    clustered: Mapping[Student, KMeansResult],
    options: TableOptions,
    comm: Comm,
    *,
    temperatures: Temperatures,
) -> dict[str, float]:
    """Temperature, own mass, entropy and misplaced peaks of the soft targets, by space."""
    found: dict[str, float] = {}
    for space, result in clustered.items():
        groups = _groups(result, options, comm)
        figures = target_figures(**groups, temperature=temperatures[space], comm=comm)
        found[f"{space}_target_temperature"] = temperatures[space]
        found |= {f"{space}_target_{k}": float(v) for k, v in figures._asdict().items()}
    return found


def _groups(result: KMeansResult, options: TableOptions, comm: Comm) -> dict[str, Any]:
    """This rank's centroids, as targets are made of them, and how many samples each has."""
    centroids, counts = own_rows(result.centroids, comm), own_rows(result.counts, comm)
    return {
        "teacher": unit_rows(centroids) if options.unit_centroids else centroids,
        "counts": counts,
        "valid": counts > 0,
        "num_prototypes": result.centroids.shape[0],
    }


def own_rows(rows: Tensor, comm: Comm) -> Tensor:
    """This rank's part of rows that every rank has."""
    first, last = comm.row_range(rows.shape[0])
    return rows[first:last]
