"""Which concepts an image shows, by a pair's own prompts, from thresholds of one's own data.

A tag costs one product with vectors that a scan computes anyway, so every sample gets its tags.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from trainer.concepts.bank import Bank
from trainer.concepts.tags import calibrated_threshold
from trainer.errors import DataError

FORMAT = "protoscale-thresholds-1"
_IMAGES_AT_ONCE = 256
_CONCEPTS_AT_ONCE = 256
"""Of a product with all of the other kind, whose number has no bound."""


class Tagger:
    """Concepts whose prompt vector is at least as near to an image as their threshold says."""

    def __init__(
        self,
        classes: Float32[Tensor, "concepts dim"],
        thresholds: Float[np.ndarray, " concepts"],
    ) -> None:
        self.classes, self.thresholds = classes, torch.from_numpy(thresholds).float()
        self.digest = hashlib.sha256(
            classes.numpy().tobytes() + self.thresholds.numpy().tobytes()
        ).hexdigest()

    def __call__(self, images: Float32[Tensor, "n dim"]) -> list[list[int]]:
        return [
            row.nonzero()[:, 0].tolist()
            for some in images.split(_IMAGES_AT_ONCE)
            for row in some @ self.classes.T >= self.thresholds
        ]


def class_vectors(
    names: Sequence[str], templates: Sequence[str], text_vectors: Callable[[list[str]], Tensor]
) -> Float32[Tensor, "concepts dim"]:
    """Of each name the mean over its prompts, of unit length again."""
    prompts = [template.format(name) for name in names for template in templates]
    vectors = text_vectors(prompts).view(len(names), len(templates), -1)
    return normalize(vectors.mean(dim=1), dim=-1)


def calibrate(
    images: Float32[Tensor, "n dim"],
    shows: Int64[np.ndarray, " n"],
    classes: Float32[Tensor, "concepts dim"],
    *,
    precision: float,
) -> Float[np.ndarray, " concepts"]:
    """Of each concept the lowest threshold at which this share of its tags is right; `shows` is the
    number of the concept that each image shows.

    Infinite where no threshold reaches it, and where no labelled image shows the concept: then it
    is tagged nowhere.
    """
    found = np.full(len(classes), np.inf)
    for some in np.array_split(np.unique(shows), len(classes) // _CONCEPTS_AT_ONCE + 1):
        scores = (images @ classes[torch.from_numpy(some)].T).numpy().astype(np.float64)
        for column, concept in enumerate(some.tolist()):
            found[concept] = calibrated_threshold(
                scores[:, column], shows == concept, precision=precision
            )
    return found


def save_thresholds(
    path: Path, bank: Bank, thresholds: Float[np.ndarray, " concepts"], about: dict[str, object]
) -> None:
    """By name; null where a concept is tagged nowhere."""
    by_name = {
        name: float(value) if np.isfinite(value) else None
        for name, value in zip(bank.names, thresholds, strict=True)
    }
    values = {"format": FORMAT, **about, "thresholds": by_name}
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_thresholds(path: Path, bank: Bank) -> tuple[Float[np.ndarray, " concepts"], list[str]]:
    """One a concept of the bank, and the prompts that they were found with."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        by_name, templates = values["thresholds"], list(values["templates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no thresholds ({error}); make them with tools/scan.py --calibrate"
        ) from None
    if lacking := [name for name in bank.names if name not in by_name]:
        raise DataError(
            f"{path} has no threshold of {len(lacking)} concepts of the bank, as {lacking[0]!r}; "
            "calibrate with this bank"
        )
    found = [by_name[name] for name in bank.names]
    return np.array([np.inf if value is None else value for value in found]), templates
