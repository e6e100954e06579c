"""By which rule samples are kept: what is asked for, and the order of a cluster's members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from pydantic import Field, ValidationError, model_validator

from trainer.errors import ConfigError
from trainer.hashing import key_of, uniform
from trainer.settings.errors import explain
from trainer.settings.section import Frozen, OnlyWhere, OnlyWith, PositiveInt
from trainer.settings.text import parsed_override

Rule = Literal["uniform", "topscore", "near", "far", "score_weighted", "balance"]
_LEAST_WEIGHT = 1e-4


class Policy(Frozen):
    """Everything that decides a selection besides the scan."""

    rule: Rule = "uniform"
    """Which members of a cluster stay: those of the lowest hash, the highest cosine of image and
    caption, the nearest to the centroid, the farthest, those that a draw weighted by the cosine
    takes. `balance`: by the concepts in captions, whatever the cluster (MetaCLIP)."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of the samples that may be kept. Not of `balance`."""
    clusters: PositiveInt | None = None
    """Of the k-means over image vectors; None: all samples are one cluster."""
    iterations: Annotated[PositiveInt, OnlyWith("clusters")] = 20
    merge_cosine: Annotated[float | None, Field(gt=-1, le=1), OnlyWith("clusters")] = None
    """Clusters whose centroids are at least so near count as one."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """A cluster of n members gives in proportion to n^alpha."""
    resample: Annotated[bool, OnlyWhere("rule", "uniform", "balance")] = False
    """Keep a share of the epochs instead of a share of the samples: drawn anew for each epoch."""
    gate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples, those of the lowest cosine, that is never kept."""
    gate_when: Annotated[Literal["before", "after"], OnlyWith("gate")] = "before"
    """`before`: clusters are of those that passed. `after`: what was kept must have passed too, so
    that fewer are."""
    threshold: Annotated[float | None, Field(gt=0), OnlyWhere("rule", "balance")] = None
    """Samples with a concept beyond which it is thinned out."""
    near_duplicates: bool = True
    """False: leave out pictures that the scan found near an earlier one."""
    duplicate_cosine: Annotated[float | None, Field(gt=0, le=1)] = None
    """Leave out samples whose image vector is at least so near to that of a lower id."""
    seed: int = 0

    @model_validator(mode="after")
    def _balance_has_its_threshold(self) -> Policy:
        if self.rule == "balance" and self.threshold is None:
            raise ValueError("balance needs a `threshold`, as 20000 for 400 million samples")
        if self.rule in ("near", "far") and self.clusters is None:
            raise ValueError(f"{self.rule} is about centroids: give `clusters`")
        return self


PRESETS: dict[str, dict[str, object]] = {
    "tldr-paper": {"rule": "uniform", "share": 0.25, "clusters": 3000},
    "tldr-repo": {
        "rule": "uniform",
        "share": 0.5,
        "clusters": 1000,
        "gate": 0.5,
        "gate_when": "after",
    },
    "dynamics": {
        "rule": "uniform",
        "share": 0.5,
        "clusters": 50_000,
        "iterations": 10,
        "merge_cosine": 0.7,
        "alpha": 0.2,
        "resample": True,
    },
}
"""TL;DR as its paper says (arXiv 2305.20087), as its published list of samples is best explained,
and the resampling of DynamiCS (arXiv 2604.27932)."""


def read_policy(given: Mapping[str, object], overrides: Sequence[str]) -> Policy:
    """A preset's values with `key=value` changes; ConfigError says which key is wrong."""
    values = dict(given)
    for override in overrides:
        key, value = parsed_override(override)
        values[".".join(key)] = value
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"policy: {explain(error, Policy)}") from error


def member_order(
    rule: Rule,
    ids: Int64[np.ndarray, " n"],
    scores: Float64[np.ndarray, " n"],
    distances: Float64[np.ndarray, " n"],
    *,
    seed: int,
) -> Float64[np.ndarray, " n"]:
    """The lower, the sooner a sample is kept; a pure function of the sample."""
    draws = uniform(torch.from_numpy(ids), key_of(seed, "select")).numpy()
    match rule:
        case "topscore":
            return -scores
        case "near":
            return distances
        case "far":
            return -distances
        case "score_weighted":
            # Efraimidis and Spirakis, 2006: the largest u^(1/w).
            return np.asarray(
                -np.log(np.maximum(draws, 1e-300)) / np.maximum(scores, _LEAST_WEIGHT)
            )
    return np.asarray(draws, np.float64)


def first_of_each(
    clusters: Int64[np.ndarray, " n"],
    order: Float64[np.ndarray, " n"],
    ids: Int64[np.ndarray, " n"],
    most: Int64[np.ndarray, " clusters"],
) -> Int64[np.ndarray, " kept"]:
    """The places of the first `most[c]` members of every cluster c; of equals the lower id."""
    sorted_places = np.lexsort((ids, order, clusters))
    ranked = clusters[sorted_places]
    starts = np.searchsorted(ranked, ranked, side="left")
    within = np.arange(len(ranked)) - starts
    return np.asarray(sorted_places[within < most[ranked]], np.int64)
