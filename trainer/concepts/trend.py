"""Does accuracy grow with frequency? Over single concepts, with what a bin mean hides.

A row is a concept in a data set: its frequency, how many of its samples were named right, of how
many. Correlations are over rows; data sets may differ in level, so a slope within data sets stands
beside the pooled one; intervals resample concepts: one of several data sets is a single draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from trainer.concepts.binned import NUM_BINS, binned, pearson
from trainer.errors import DataError

RESAMPLES = 1000
LEVEL = 0.95
_ITERATIONS = 100
_TOLERANCE = 1e-10


class Table(NamedTuple):
    """Rows of equal length."""

    dataset: Sequence[str]
    concept: Sequence[str]
    frequency: Int64[np.ndarray, " rows"]
    right: Int64[np.ndarray, " rows"]
    """Samples of the concept that were named right."""
    samples: Int64[np.ndarray, " rows"]

    @property
    def accuracy(self) -> Float64[np.ndarray, " rows"]:
        """Percent."""
        found: NDArray[np.float64] = 100.0 * self.right / self.samples
        return found

    @property
    def decades(self) -> Float64[np.ndarray, " rows"]:
        """log10(max(count, 1))."""
        found: NDArray[np.float64] = np.log10(np.maximum(self.frequency, 1).astype(np.float64))
        return found

    def rows(self, chosen: NDArray[Any]) -> Table:
        index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        places = index.tolist()
        return Table(
            [self.dataset[place] for place in places],
            [self.concept[place] for place in places],
            *(self.frequency[index], self.right[index], self.samples[index]),
        )


def trend(table: Table, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """All figures of a table. Slopes are percentage points a decade of frequency.

    DataError where there are fewer than three rows.
    """
    if len(table.frequency) < 3:
        raise DataError(
            f"{len(table.frequency)} concepts have both a frequency and an accuracy; three at "
            "least are needed, so look at the names of bank and classes"
        )
    seen = table.rows(table.frequency > 0)
    return {
        "rows": len(table.frequency),
        "concepts": len(set(table.concept)),
        "samples": int(table.samples.sum()),
        "datasets": sorted(set(table.dataset)),
        "seed": seed,
        "resamples": resamples,
        "per_concept": _per_concept(table),
        "per_concept_without_zero": _per_concept(seen) if len(seen.frequency) > 2 else None,
        "within_datasets": interval(table, within_slope, seed=seed, resamples=resamples)
        | {"r": within_r(table)},
        "binomial": binomial(table)
        | interval(table, lambda t: binomial(t)["slope"], seed=seed, resamples=resamples // 5),
        "zero_frequency": _level(table.rows(table.frequency == 0)),
        "by_frequency": by_frequency(table),
        "binned_as_published": _published(table),
    }


def _per_concept(table: Table) -> dict[str, Any]:
    from scipy import stats  # takes two seconds to import

    x, y = table.decades, table.accuracy
    r, p = pearson(x, y)
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    rank = float("nan") if constant else float(stats.spearmanr(table.frequency, y).statistic)
    return {"rows": len(x), "pearson": r, "p_value": p, "spearman": rank, "slope": _slope(x, y)}


def within_slope(table: Table) -> float:
    """The least-squares slope after each data set's means are taken off: fixed effects."""
    return _slope(*_centred(table))


def within_r(table: Table) -> float:
    """Pearson's r of what is left when each data set's means are taken off."""
    return pearson(*_centred(table))[0]


def _centred(table: Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    group = _numbers(table.dataset)
    size = np.bincount(group)
    x, y = table.decades, table.accuracy
    means = [(np.bincount(group, column) / size)[group] for column in (x, y)]
    return x - means[0], y - means[1]


def _slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    offset = x - x.mean()
    spread = float(offset @ offset)
    return float(offset @ (y - y.mean()) / spread) if spread > 0 else float("nan")


def interval(
    table: Table, statistic: Callable[[Table], float], *, seed: int, resamples: int
) -> dict[str, Any]:
    """The statistic and its percentile interval, by drawing concepts with replacement.

    `None` where too few draws have a value, as when one concept carries all the spread.
    """
    draw = np.random.default_rng(seed)
    concepts = _numbers(table.concept)
    order = np.argsort(concepts, kind="stable")
    ends = np.cumsum(np.bincount(concepts))
    rows_of = np.split(order, ends[:-1])
    found = np.array(
        [
            statistic(table.rows(np.concatenate([rows_of[i] for i in drawn])))
            for drawn in draw.integers(len(rows_of), size=(resamples, len(rows_of)))
        ]
    )
    known = found[~np.isnan(found)]
    enough = len(known) > resamples / 2
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    limits = [float(v) for v in np.quantile(known, tails)] if enough else None
    return {"slope": statistic(table), "interval": limits}


def binomial(table: Table) -> dict[str, Any]:
    """logit(accuracy) = slope * log10(count) + a level for each data set, by maximum likelihood.

    Unlike a line through percentages it knows that a concept of two samples says less than one of
    two hundred. `slope` is NaN where no finite one is best: all right on one side, say.
    """
    group = _numbers(table.dataset)
    design = np.column_stack([table.decades, np.eye(group.max() + 1)[group]])
    weights, information = _logistic(design, table.right, table.samples)
    slope = float(weights[0])
    if np.isnan(slope):
        return {"slope": slope, "standard_error": slope}
    return {"slope": slope, "standard_error": float(np.sqrt(np.linalg.pinv(information)[0, 0]))}


def _logistic(
    design: NDArray[np.float64], right: NDArray[np.int64], samples: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights and Fisher information by Newton's method; NaN where it does not settle."""
    weights = np.zeros(design.shape[1])
    for _ in range(_ITERATIONS):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        information = design.T @ (design * (samples * chance * (1 - chance))[:, None])
        step = np.linalg.pinv(information, hermitian=True) @ (design.T @ (right - samples * chance))
        weights = weights + step
        if np.abs(step).max() < _TOLERANCE:
            return weights, information
    return np.full_like(weights, np.nan), information


def by_frequency(table: Table) -> list[dict[str, Any]]:
    """Levels at 0, 1-9, 10-99, ...: rows, samples, mean of rows, and over all samples."""
    decade = np.where(table.frequency == 0, -1, np.floor(table.decades)).astype(int)
    found = []
    for number in sorted(set(decade.tolist())):
        name = "0" if number < 0 else f"{10**number}-{10 ** (number + 1) - 1}"
        found.append({"frequency": name} | _level(table.rows(decade == number)))
    return found


def _level(table: Table) -> dict[str, Any]:
    samples = int(table.samples.sum())
    return {
        "rows": len(table.frequency),
        "samples": samples,
        "mean_of_concepts": float(table.accuracy.mean()) if len(table.frequency) else None,
        "of_all_samples": 100.0 * int(table.right.sum()) / samples if samples else None,
    }


def _published(table: Table) -> dict[str, Any]:
    found = binned(table.frequency, table.accuracy, num_bins=NUM_BINS)
    return {
        "rho": found.rho,
        "p_value": found.p_value,
        "right_edges": np.exp(found.log_edges).tolist(),
        "rows": found.rows.tolist(),
        "mean": found.mean.tolist(),
        "deviation": found.deviation.tolist(),
    }


def _numbers(names: Sequence[str]) -> NDArray[np.int64]:
    return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.int64)
