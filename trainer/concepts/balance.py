"""Keep probabilities that flatten the head of the concepts and keep the tail whole.

Xu et al., "Demystifying CLIP Data", arXiv 2309.16671: a caption is kept if any of its concepts
draws it, a concept of count T drawing with probability min(1, t / T). Several languages get a
threshold each, so that all have the same share of hits in their tails as the first one has.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from trainer.errors import DataError


def draw_probability(
    counts: Int64[np.ndarray, " concepts"], threshold: float
) -> Float64[np.ndarray, " concepts"]:
    """min(1, t / T) of each concept; 1 where it never occurs."""
    found: NDArray[np.float64] = np.minimum(1.0, threshold / np.maximum(counts, 1))
    return found


def keep_probability(found: tuple[int, ...], draws: Float64[np.ndarray, " concepts"]) -> float:
    """1 - prod(1 - draw) over a caption's concepts: independent draws, any of them keeps it."""
    return 1.0 - float(np.prod(1.0 - draws[list(found)]))


def tail_share(counts: Int64[np.ndarray, " concepts"], threshold: float) -> float:
    """The share of all hits that belong to concepts under the threshold."""
    total = int(counts.sum())
    if not total:
        raise DataError("no concept was found in any caption, so there is nothing to balance")
    return int(counts[counts < threshold].sum()) / total


def thresholds_of_languages(
    counts: Mapping[str, Int64[np.ndarray, " concepts"]], *, first: str, threshold: float
) -> dict[str, float]:
    """Of each language the largest threshold whose tail has at most the first one's share."""
    if threshold <= 0:
        raise DataError(f"a threshold of {threshold:g} keeps nothing; give one above zero")
    share = tail_share(counts[first], threshold)
    return {
        language: threshold if language == first else _threshold(own, share)
        for language, own in counts.items()
    }


def _threshold(counts: Int64[np.ndarray, " concepts"], share: float) -> float:
    levels = np.unique(counts[counts > 0])
    if not len(levels):
        return 1.0
    below = [tail_share(counts, float(level)) for level in levels]
    fitting = np.flatnonzero(np.asarray(below) <= share)
    return float(levels[fitting[-1]])
