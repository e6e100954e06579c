"""Which concepts images show, as any tagger says: lines of JSON, one an image."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from trainer.concepts.bank import Bank
from trainer.data.index import sample_id
from trainer.errors import DataError


class Tags:
    """`{"shard": "train-000000", "key": "cat_1", "tags": {"cat": 0.91}}` a line, and `"set"` where
    the shards are of a named set.

    A tag counts from its concept's threshold on. An image without a line has no tags known, and is
    in no denominator; one with an empty `tags` shows none of the concepts.
    """

    def __init__(
        self, path: Path, bank: Bank, thresholds: Mapping[str, float] | float = 0.0
    ) -> None:
        self.path = path
        number = {name: place for place, name in enumerate(bank.names)}
        least = thresholds if isinstance(thresholds, Mapping) else None
        floor = 0.0 if isinstance(thresholds, Mapping) else thresholds
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"can't read the tags {path}: {error.strerror}") from None
        self._tags: dict[int, tuple[int, ...]] = {}
        for place, line in enumerate(data.splitlines(), start=1):
            sample, scores = _read(line, f"{path} line {place}")
            if unknown := [name for name in scores if name not in number]:
                raise DataError(
                    f"{path} line {place} has the tag {unknown[0]!r}, which the bank lacks; tag "
                    "with the bank's names"
                )
            if sample in self._tags:
                raise DataError(
                    f"{path} line {place} is a second line of one image; give each image one"
                )
            self._tags[sample] = tuple(
                number[name]
                for name, score in scores.items()
                if score >= (least.get(name, floor) if least is not None else floor)
            )
        about = json.dumps(thresholds if least is None else dict(least), sort_keys=True)
        self.digest = hashlib.sha256(data + about.encode()).hexdigest()

    def of(self, sample: int) -> tuple[int, ...] | None:
        return self._tags.get(sample)


def _read(line: bytes, place: str) -> tuple[int, dict[str, float]]:
    try:
        values = json.loads(line)
        scores = {str(name): float(score) for name, score in values["tags"].items()}
        if not all(math.isfinite(score) for score in scores.values()):
            raise ValueError("a score is no finite number")
        where = str(values["shard"]), str(values["key"]), str(values.get("set", ""))
        return sample_id(*where), scores
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{place} is no line of tags ({error!r}); write {{"shard": ..., "key": ..., '
            '"tags": {...}}'
        ) from None


def calibrated_threshold(
    scores: Float[np.ndarray, " n"], shows: Bool[np.ndarray, " n"], *, precision: float
) -> float:
    """The lowest threshold from which on at least this share of the tags are right.

    `scores` of labelled images; infinite where no threshold reaches it. The default thresholds of
    taggers were set on other concepts: open-set scores run lower.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], shows[order]
    share: NDArray[np.float64] = np.cumsum(right) / np.arange(1, len(right) + 1)
    last_of_ties = np.append(ranked[1:] != ranked[:-1], True)
    good = np.flatnonzero((share >= precision) & last_of_ties)
    return float(ranked[good[-1]]) if len(good) else float("inf")
