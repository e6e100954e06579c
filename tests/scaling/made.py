"""Made-up studies whose law is known."""

from __future__ import annotations

import numpy as np

from trainer.scaling.points import Point, Points, columns


def along_compute(error_of, *, count=24, noise=0.0, seed=0, low=1e15, high=1e21, **names) -> Points:
    """Runs at even distances in log compute; `noise` is the deviation of log error."""
    draw = np.random.default_rng(seed)
    compute = np.geomspace(low, high, count)
    error = error_of(compute) * np.exp(noise * draw.standard_normal(count))
    return columns(
        Point(run=f"r{at}", error=float(e), compute=float(c), **names)
        for at, (c, e) in enumerate(zip(compute, error, strict=True))
    )


def grid(error_of, *, sizes=6, lengths=6, unique=np.inf, noise=0.0, seed=0, **names) -> Points:
    """A ladder of models x samples seen; compute is 6 N D. `unique`: samples in the corpus."""
    draw = np.random.default_rng(seed)
    rows = []
    for parameters in np.geomspace(1e6, 1e9, sizes):
        for samples in np.geomspace(1e7, 3e10, lengths):
            there = np.broadcast_to(np.minimum(samples, unique), np.shape(unique) or (1,))
            for own in np.unique(there):
                value = error_of(parameters, samples, own)
                error = value * np.exp(noise * draw.standard_normal())
                rows.append(
                    Point(
                        run=f"r{len(rows)}",
                        error=float(error),
                        compute=float(6 * parameters * samples),
                        parameters=float(parameters),
                        samples=float(samples),
                        unique_samples=float(own),
                        **names,
                    )
                )
    return columns(rows)
