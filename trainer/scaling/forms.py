"""Laws that an error may follow, as log error and its derivatives in free numbers.

Every number of a law that must be positive is fitted as its logarithm, so a law's floor of zero
is where that number has gone to minus infinity: the law without a floor is inside the law with
one. Compute, parameters and samples are measured from the middle of the fitted points.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from trainer.scaling.points import Points

Array = NDArray[np.float64]
FormName = Literal["power", "floor", "shifted", "parametric", "repeated"]

MEANING = {
    "power": "error = beta * C^alpha",
    "floor": "error = floor + beta * C^alpha",
    "shifted": "error = floor + beta * (C + shift)^alpha",
    "parametric": "error = floor + A / N^alpha_n + B / D^alpha_d",
    "repeated": "error = floor + A / N^alpha_n + B / D_effective^alpha_d; pass k over a sample "
    "counts 2^(-k / half_life) times its logarithm",
}
"""C is compute, N trained parameters, D samples seen."""


class Inputs(NamedTuple):
    """What a law reads of each point: logarithms, less the middle's."""

    compute: Array
    parameters: Array
    samples: Array
    unique: Array
    middle: Float64[np.ndarray, " axes"]
    """Natural logarithms of compute, parameters and samples at the middle."""
    passes: Float64[np.ndarray, "points passes"]
    """By how much each further pass over the samples lengthens the logarithm of their number."""


def inputs(points: Points, middle: Array | None = None) -> Inputs:
    """As a law reads these points; `middle` is that of the points it was fitted to."""
    logs = [np.log(column) for column in (points.compute, points.parameters, points.samples)]
    if middle is None:
        middle = np.array([log.mean() for log in logs])
    fresh = np.log(np.minimum(points.samples, points.unique_samples)) - middle[2]
    compute, parameters, samples = (log - centre for log, centre in zip(logs, middle, strict=True))
    passes = _passes(points.samples / points.unique_samples)
    return Inputs(compute, parameters, samples, fresh, middle, passes)


def _passes(epochs: Array) -> Array:
    """log((k + 1) / k) for each whole pass behind the first, less for one that is not whole."""
    most = float(np.nanmax(epochs, initial=1.0)) if np.isfinite(epochs).any() else 1.0
    begun = np.arange(1, max(1, int(np.ceil(most))) + 1, dtype=np.float64)
    reached = np.clip(epochs[:, None], begun, begun + 1)
    return np.where(np.isfinite(reached), np.log(reached / begun), 0.0)


class Form(NamedTuple):
    """One of the laws."""

    name: FormName

    @property
    def numbers(self) -> tuple[str, ...]:
        """What a fit reports, in the order of `reported`."""
        return _NUMBERS[self.name]

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of the table that it needs."""
        many = ("parameters", "samples")
        more = {"parametric": many, "repeated": (*many, "unique_samples")}
        return more.get(self.name, ("compute",))

    def log_error(self, free: Array, x: Inputs) -> tuple[Array, Array]:
        """[draws, points] at `free` [draws, numbers], and derivatives [draws, points, numbers]."""
        terms, slopes = self._terms(free, x)
        top = terms.max(axis=0)
        share = np.exp(terms - top)
        total = share.sum(axis=0)
        share /= total
        return top + np.log(total), np.einsum("tdn,tdnp->dnp", share, slopes)

    def _terms(self, free: Array, x: Inputs) -> tuple[Array, Array]:
        """Logarithms of the law's summands [summands, draws, points], and their derivatives."""
        draws, points = len(free), len(x.compute)
        terms: list[Array] = []
        slopes: list[Array] = []

        def summand(level: int, along: Array | None, exponent: int | None) -> Array:
            """exp(level) * exp(along) ** -exp(exponent), or the level alone."""
            slope = np.zeros((draws, points, free.shape[1]))
            slope[:, :, level] = 1.0
            value = np.repeat(free[:, level, None], points, axis=1)
            if along is not None and exponent is not None:
                power = np.exp(free[:, exponent, None])
                value = value - power * along
                slope[:, :, exponent] = -power * along
            terms.append(value)
            slopes.append(slope)
            return slope

        if self.name == "power":
            slope = summand(0, None, None)
            slope[:, :, 1] = x.compute
            terms[0] = terms[0] + free[:, 1, None] * x.compute
        elif self.name == "floor":
            summand(0, x.compute[None], 1)
            summand(2, None, None)
        elif self.name == "shifted":
            shifted = np.logaddexp(x.compute[None], free[:, 3, None])
            slope = summand(0, shifted, 1)
            slope[:, :, 3] = -np.exp(free[:, 1, None] + free[:, 3, None] - shifted)
            summand(2, None, None)
        else:
            summand(0, x.parameters[None], 1)
            seen = x.samples[None]
            longer = None
            if self.name == "repeated":
                seen, longer = _effective(free[:, 5], x)
            slope = summand(2, seen, 3)
            if longer is not None:
                slope[:, :, 5] = -np.exp(free[:, 3, None]) * longer
            summand(4, None, None)
        return np.stack(terms), np.stack(slopes)

    def reported(self, free: Array, middle: Array) -> Array:
        """The law's numbers in the table's units [draws, numbers]; infinite where too large."""
        with np.errstate(over="ignore"):
            return self._reported(free, middle)

    def _reported(self, free: Array, middle: Array) -> Array:
        if self.name == "power":
            return np.stack([free[:, 1], np.exp(free[:, 0] - free[:, 1] * middle[0])], axis=1)
        if self.name in ("floor", "shifted"):
            alpha = np.exp(free[:, 1])
            found = [-alpha, np.exp(free[:, 0] + alpha * middle[0]), np.exp(free[:, 2])]
            if self.name == "shifted":
                found.append(np.exp(free[:, 3] + middle[0]))
            return np.stack(found, axis=1)
        of_n, of_d = np.exp(free[:, 1]), np.exp(free[:, 3])
        found = [of_n, np.exp(free[:, 0] + of_n * middle[1]), of_d]
        found += [np.exp(free[:, 2] + of_d * middle[2]), np.exp(free[:, 4])]
        if self.name == "repeated":
            found.append(np.exp(free[:, 5]))
        return np.stack(found, axis=1)

    def starts(self, log_error: Array) -> Array:
        """Where to begin the search, [starts, numbers]; `log_error` are those of the points."""
        low, middle = float(log_error.min()), float(log_error.mean())
        if self.name == "power":
            return np.array([[middle, -0.1], [middle, 0.0]])
        exponents = np.log([0.05, 0.15, 0.4, 1.0])
        floors = low + np.log([0.9, 0.5, 0.05])
        if self.name == "floor":
            return _grid([middle - 1], exponents, floors)
        if self.name == "shifted":
            return _grid([middle - 1], exponents, floors, [-6.0, -2.0, 0.0])
        inner = np.log([0.1, 0.3, 0.8])
        grid = _grid([middle - 1], inner, [middle - 1], inner, floors)
        if self.name == "parametric":
            return grid
        many = [np.column_stack([grid, np.full(len(grid), np.log(tau))]) for tau in (1.0, 10.0)]
        return np.concatenate(many)

    def nested(self) -> int | None:
        """Which free number is the logarithm of the floor."""
        return {"floor": 2, "shifted": 2, "parametric": 4, "repeated": 4}.get(self.name)


_NUMBERS: dict[str, tuple[str, ...]] = {
    "power": ("alpha", "beta"),
    "floor": ("alpha", "beta", "floor"),
    "shifted": ("alpha", "beta", "floor", "shift"),
    "parametric": ("alpha_n", "A", "alpha_d", "B", "floor"),
    "repeated": ("alpha_n", "A", "alpha_d", "B", "floor", "half_life"),
}


def _effective(log_half_life: Array, x: Inputs) -> tuple[Array, Array]:
    """log of the samples that the seen ones are worth [draws, points], and its derivative.

    Fresh samples count whole; the k-th pass behind the first lengthens the logarithm by
    2^(-k / half_life) of what fresh samples would (arXiv 2404.07177).
    """
    number = np.arange(1, x.passes.shape[1] + 1)
    rate = np.log(2.0) * number / np.exp(log_half_life)[:, None]
    decay = np.exp(-rate)
    return x.unique[None] + decay @ x.passes.T, (decay * rate) @ x.passes.T


def _grid(*axes: object) -> Array:
    """Every combination of the values, a row each."""
    arrays = [np.asarray(axis, dtype=np.float64) for axis in axes]
    return np.stack(np.meshgrid(*arrays, indexing="ij"), axis=-1).reshape(-1, len(arrays))
